"""The loop: epochs, averages, schedules, early stopping, and going on bit for bit after a stop."""

import copy
import csv
import json
import os
import re
import signal
import threading

import pytest
import torch
from comparing import Comparing
from torch import nn

from vitkit import Run
from vitkit.errors import RunDirectoryError, RunError, UsageError
from vitkit.runs.directory import LAST
from vitkit.training.checkpoint import load_state
from vitkit.training.optim import warmup_cosine


class Points:
    """Batches of points on a noisy line, the same for the same epoch and index."""

    def __init__(self, batches=5, size=8):
        self.batches, self.size = batches, size

    def __len__(self):
        return self.batches

    def epoch(self, number, *, seed=0, start=0, device="cpu", rank=0, world=1):
        for index in range(start, self.batches):
            generator = torch.Generator().manual_seed(1000 * seed + 100 * number + index)
            x = torch.randn(self.size, 3, generator=generator)
            yield {"images": x, "labels": x.sum(1)}


class Line(nn.Module):
    """A line with dropout, so that a step depends on the random state."""

    def __init__(self, stop_at=None, poison_at=None, dropout=0.3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(dropout), nn.Linear(16, 1))
        self.calls, self.stop_at, self.poison_at = 0, stop_at, poison_at

    def forward(self, batch):
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        error = (self.net(batch["images"]).squeeze(1) - batch["labels"]).square().mean()
        if self.calls == self.poison_at:
            error = error * float("nan")
        return {"loss": error, "error": error.detach()}


def train(out, *, stop_at=None, poison_at=None, epochs=3, batches=None, run_options=None, **options):
    """Train a line; the run, the model and the epochs that were yielded."""
    run = Run(out, device="cpu", precision="fp32", **(run_options or {}))
    torch.manual_seed(0)
    model = Line(stop_at, poison_at)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = warmup_cosine(optimizer, 15, warmup=2)
    seen = []
    try:
        for epoch in run.fit(
            model, Points() if batches is None else batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=1.0, **options
        ):
            seen.append(epoch)
            epoch.log(error=epoch.losses["error"], weight=model.net[0].weight.sum().item())
        run.finish()
    finally:
        run.close()
    return run, model, seen


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_an_epoch_is_yielded_with_its_mean_losses_and_written_down(tmp_path):
    _run, _model, seen = train(tmp_path / "run")
    assert [epoch.number for epoch in seen] == [1, 2, 3]
    assert [epoch.step for epoch in seen] == [5, 10, 15]
    assert seen[-1].losses["loss"] < seen[0].losses["loss"]
    written = rows(tmp_path / "run" / "metrics.csv")
    assert [float(row["error"]) for row in written] == [epoch.losses["error"] for epoch in seen]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["final"]["error"] == seen[-1].losses["error"]
    assert summary["steps"] == 15
    assert (tmp_path / "run" / "report.html").exists()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    one, two = train(tmp_path / "a")[1], train(tmp_path / "b")[1]
    other = train(tmp_path / "c", run_options={"seed": 1})[1]
    assert same(one, two)
    assert not same(one, other)


@pytest.mark.parametrize("call", [1, 7, 10, 15])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_stopped_anywhere_and_resumed_it_ends_bit_for_bit_where_an_undisturbed_run_ends(tmp_path, call, ema):
    _, whole, _ = train(tmp_path / "whole", ema=ema, monitor="error", mode="min")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=call, ema=ema, monitor="error", mode="min")
    _, resumed, _ = train(tmp_path / "cut", ema=ema, monitor="error", mode="min", run_options={"resume": True})
    assert same(whole, resumed)
    for name in ("metrics.csv", "losses.csv"):
        cut, undisturbed = rows(tmp_path / "cut" / name), rows(tmp_path / "whole" / name)
        volatile = ("seconds", "images_per_second")
        assert [{k: v for k, v in row.items() if k not in volatile} for row in cut] == [
            {k: v for k, v in row.items() if k not in volatile} for row in undisturbed
        ]


def test_stopped_in_an_evaluation_only_that_is_repeated(tmp_path):
    run = Run(tmp_path / "cut", device="cpu", precision="fp32")
    torch.manual_seed(0)
    model = Line()
    with pytest.raises(ZeroDivisionError):
        for epoch in run.fit(model, Points(), epochs=3, optimizer=torch.optim.SGD(model.parameters(), lr=0.01)):
            _ = 1 / (2 - epoch.number)
    run.close()
    torch.manual_seed(0)
    again = Line()
    run = Run(tmp_path / "cut", device="cpu", precision="fp32", resume=True)
    fit = run.fit(again, Points(), epochs=3, optimizer=torch.optim.SGD(again.parameters(), lr=0.01))
    assert next(iter(fit)).number == 2
    assert again.calls == 0
    run.close()


class Uneven(Points):
    """Five batches, the last of three points; `joined` are the same in groups of two."""

    def __init__(self, joined=False):
        super().__init__()
        self.joined = joined

    def __len__(self):
        return 3 if self.joined else 5

    def epoch(self, number, *, start=0, **kwargs):
        parts = list(super().epoch(number, **kwargs))
        parts[3] = {name: value[:3] for name, value in parts[3].items()}
        if self.joined:
            pairs = (parts[0:2], parts[2:4], parts[4:5])
            parts = [{name: torch.cat([part[name] for part in pair]) for name in pair[0]} for pair in pairs]
        yield from parts[start:]


def after(out, model, batches, k, epochs=1):
    run = Run(out, device="cpu", precision="fp32", grad_accum=k)
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=torch.optim.SGD(model.parameters(), lr=0.02)):
        assert epoch.step == 3 * epoch.number
    run.close()
    return model


@pytest.mark.parametrize("make", [lambda: Line(dropout=0.0), Comparing])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, make):
    """Of a mean over samples, and of a loss that compares them; batches need not be equal."""
    torch.manual_seed(0)
    one = make()
    two, separate = copy.deepcopy(one), copy.deepcopy(one)
    after(tmp_path / "a", one, Uneven(), 2)
    after(tmp_path / "b", two, Uneven(joined=True), 1)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    run = Run(tmp_path / "c", device="cpu", precision="fp32")
    list(run.fit(separate, Uneven(), epochs=1, optimizer=torch.optim.SGD(separate.parameters(), lr=0.02)))
    run.close()
    assert not torch.allclose(one.net[0].weight, separate.net[0].weight, atol=1e-4)


def test_a_run_that_compares_groups_of_batches_goes_on_bit_for_bit(tmp_path):
    def trained(out, epochs, resume=False, stop=None):
        run = Run(out, device="cpu", precision="fp32", grad_accum=2, resume=resume)
        torch.manual_seed(0)
        model = Comparing(dropout=0.3)
        try:
            for epoch in run.fit(model, Uneven(), epochs=epochs, optimizer=torch.optim.SGD(model.parameters(), lr=0.02)):
                if epoch.number == stop:
                    raise KeyboardInterrupt
        finally:
            run.close()
        return model

    whole = trained(tmp_path / "whole", 3)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 3, stop=2)
    assert same(whole, trained(tmp_path / "cut", 3, resume=True))


def test_while_an_epoch_is_yielded_the_model_holds_its_averaged_weights(tmp_path):
    run = Run(tmp_path / "run", device="cpu", precision="fp32")
    model = Line()
    start = model.net[0].weight.detach().clone()
    held = []
    for _ in run.fit(model, Points(), epochs=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), ema=0.99):
        held.append(model.net[0].weight.detach().clone())
    run.close()
    assert torch.equal(held[-1], model.net[0].weight)
    assert (held[0] - start).norm() > 0


def test_a_metric_that_no_longer_improves_ends_the_loop(tmp_path):
    run = Run(tmp_path / "run", device="cpu", precision="fp32")
    model, values = Line(), [0.5, 0.7, 0.6, 0.65, 0.9]
    numbers = []
    for epoch in run.fit(
        model, Points(), epochs=5, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), monitor="top1", patience=2
    ):
        epoch.log(top1=values[epoch.number - 1])
        numbers.append(epoch.number)
    run.finish()
    assert numbers == [1, 2, 3, 4]
    assert (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()
    assert "top1 has not improved on 0.7000 of epoch 2 for 2 evaluations" in (tmp_path / "run" / "log.txt").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"]["top1"] == {"value": 0.7, "epoch": 2}


def test_a_loss_that_is_not_finite_names_step_parts_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"not finite at epoch 2, batch 3: loss nan, .*last.safetensors"):
        train(tmp_path / "run", poison_at=8)
    with pytest.raises(RunError, match="no checkpoint was saved before; the batches before it are in .*log.txt; try a lower"):
        train(tmp_path / "other", poison_at=1)


def test_what_led_to_a_loss_that_is_not_finite_stands_in_the_log(tmp_path):
    with pytest.raises(RunError):
        train(tmp_path / "run", poison_at=23, epochs=5)
    log = (tmp_path / "run" / "log.txt").read_text()
    said, *led = log[log.index("the loss is not finite at epoch 5, batch 3: loss nan, error") :].splitlines()
    assert said.endswith("; the last 20 batches, with the learning rate of their step:")
    assert [line.strip().split(":")[0] for line in led[:20]] == [
        f"epoch {batch // 5 + 1}, batch {batch % 5 + 1}" for batch in range(3, 23)
    ]
    pattern = r"  epoch 4, batch 5: loss ([\d.e+-]+), error \1, gradient norm [\d.e+-]+, lr [\d.e+-]+"
    assert re.fullmatch(pattern, led[16])
    assert float(led[0].split("lr ")[1]) == pytest.approx(1e-2, rel=0.2)
    assert "gradient norm nan" in led[19]


class Root(nn.Module):
    """|w|, √ of its square: at w = 0 the loss is finite and its gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        if self.training and batch["images"][0, 0] > 9:
            self.weight.data.zero_()
        return {"loss": self.weight.square().sqrt().sum()}


class Marked(Points):
    """The second epoch's last batch is marked."""

    def epoch(self, number, **kwargs):
        for index, batch in enumerate(super().epoch(number, **kwargs)):
            batch["images"][0, 0] = 10.0 if (number, index) == (1, 4) else 0.0
            yield batch


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        (None, "the weights are not finite after step 10"),
        (1.0, "the gradient is not finite at epoch 2, batch 5: loss 0, gradient norm nan"),
    ],
)
def test_weights_that_are_not_finite_are_never_saved(tmp_path, clip, said):
    run = Run(tmp_path / "run", device="cpu", precision="fp32")
    model = Root()
    with pytest.raises(RunError, match=f"{said}; the last good checkpoint is .*last.safetensors; the batches before it are in"):
        list(run.fit(model, Marked(), epochs=3, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), clip=clip))
    run.close()
    kept = load_state(tmp_path / "run" / LAST)
    assert kept.progress["fit"]["epoch"] == 0
    assert kept.model_state["weight"].isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"ema": 1.5}, "ema is 1.5; expected a decay between 0 and 1"),
        ({"patience": 3}, "patience needs monitor"),
        ({"batches": Points(0)}, "an epoch has no batches"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, options, text):
    with pytest.raises(UsageError, match=text):
        train(tmp_path / "run", **options)


def test_what_a_model_must_return(tmp_path):
    class Bare(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["images"])

    with pytest.raises(UsageError, match="returns a dict with 'loss'; got Tensor"):
        list(Run(tmp_path / "a", device="cpu").fit(m := Bare(3, 1), Points(), epochs=1, optimizer=torch.optim.SGD(m.parameters(), 0.1)))


def test_a_directory_is_held_by_one_run_and_never_overwritten_silently(tmp_path):
    held = Run(tmp_path / "run", device="cpu")
    with pytest.raises(RunDirectoryError, match="is in use by another process; wait until it ends, or choose another"):
        Run(tmp_path / "run", device="cpu")
    held.finish("interrupted")
    with pytest.raises(RunDirectoryError, match="already holds an unfinished run; give --resume to resume it, choose"):
        Run(tmp_path / "run", device="cpu")
    train(tmp_path / "done")
    with pytest.raises(RunDirectoryError, match="already holds a finished run; choose another --out, or give --over"):
        Run(tmp_path / "done", device="cpu")
    with pytest.raises(RunDirectoryError, match="nothing to resume"):
        Run(tmp_path / "done", device="cpu", resume=True)
    train(tmp_path / "done", run_options={"overwrite": True}, epochs=1)
    assert len(rows(tmp_path / "done" / "losses.csv")) == 1
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="is not empty and holds no run"):
        Run(tmp_path / "foreign", device="cpu", overwrite=True)
    with pytest.raises(RunDirectoryError, match="is a file"):
        Run(tmp_path / "foreign" / "thesis.tex", device="cpu")


def test_settings_that_this_machine_cannot_give(tmp_path):
    with pytest.raises(UsageError, match="--device tpu: this machine has"):
        Run(tmp_path, device="tpu")
    with pytest.raises(UsageError, match="--precision fp16 needs a CUDA device"):
        Run(tmp_path, device="cpu", precision="fp16")
    with pytest.raises(UsageError, match="--report-to wanb: no such tracker; did you mean 'wandb'"):
        Run(tmp_path / "x", device="cpu", report_to="csv,wanb")
    with pytest.raises(UsageError, match="--grad-accum 0: expected at least 1"):
        Run(tmp_path, grad_accum=0)


def test_losses_metrics_and_arguments_arrive_at_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, seen = train(tmp_path / "run", run_options={"report_to": "csv,tensorboard", "arguments": {"depth": 3, "wide": None}})
    written = rows(tmp_path / "run" / "losses.csv")
    (events,) = {path.parent for path in (tmp_path / "run").glob("trackers/notebook/events.out.tfevents.*")}
    found = EventAccumulator(str(events))
    found.Reload()
    curves = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert set(curves) >= {"loss", "error", "lr", "weight"}
    for name in ("loss", "lr"):
        assert curves[name] == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-6)) for row in written]
    weights = [(epoch.step, pytest.approx(epoch.logged["weight"], rel=1e-5)) for epoch in seen]
    assert curves["weight"] == weights
    (kept,) = (tmp_path / "run").rglob("hparams.yml")
    assert kept.read_text() == "depth: 3\n"
    train(tmp_path / "run", run_options={"overwrite": True}, epochs=1)
    assert not list((tmp_path / "run").rglob("events.out.tfevents.*"))
    Run(tmp_path / "dry", device="cpu", report_to="tensorboard", dry_run=True).finish()
    assert not (tmp_path / "dry").exists()


def test_a_schedule_warms_up_and_comes_down():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 10, warmup=2, floor=0.1)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(2.0 * 0.55)
    assert rates[10] == pytest.approx(0.2)
    with pytest.raises(UsageError, match="10 steps with 11 of warm-up"):
        warmup_cosine(optimizer, 10, warmup=11)


def test_signal_handlers_are_put_back(tmp_path):
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path / "run", epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_led_to_a_spike_stands_in_the_log_and_the_run_goes_on(tmp_path):
    """Sixty ordinary batches, one far above them, and ordinary ones again."""

    class Spiking(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, batch):
            index = float(batch["images"][0])
            return {"loss": self.weight * 0 + (50.0 if index == 60 else 1.0 + 0.01 * (index % 7))}

    class Batches:
        def __len__(self):
            return 80

        def epoch(self, number, *, seed=0, start=0, device="cpu", rank=0, world=1):
            return ({"images": torch.tensor([float(index)])} for index in range(start, 80))

    run, model = Run(tmp_path / "run", device="cpu", precision="fp32"), Spiking()
    epochs = [epoch.number for epoch in run.fit(model, Batches(), epochs=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))]
    run.close()
    assert epochs == [1, 2]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("the loss spikes at") == 2  # once an epoch, and nowhere else
    assert "the loss spikes at epoch 1, batch 61: 50, the median before it was 1.03; the batches before it:" in log
    led = log.split("the batches before it:\n")[1].splitlines()[:20]
    assert led[0].strip().startswith("epoch 1, batch 42: loss 1.06")
    assert led[-1].strip() == "epoch 1, batch 61: loss 50, lr 0.5"
