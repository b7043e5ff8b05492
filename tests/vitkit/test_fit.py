"""The loop: epochs, averages, schedules, early stopping, and going on bit for bit after a stop."""

import csv
import json
import os
import signal
import threading

import pytest
import torch
from torch import nn

from vitkit import Run
from vitkit.errors import RunDirectoryError, RunError, UsageError
from vitkit.optim import warmup_cosine


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

    def __init__(self, stop_at=None, poison_at=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.3), nn.Linear(16, 1))
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


def test_accumulated_gradients_are_those_of_the_mean_over_the_group(tmp_path):
    class Plain(Line):
        def __init__(self):
            super().__init__()
            self.net[1].p = 0.0

    class Joined(Points):
        def epoch(self, number, **kwargs):
            parts = list(super().epoch(number, **kwargs))
            for pair in (parts[0:2], parts[2:4]):
                yield {name: torch.cat([part[name] for part in pair]) for name in pair[0]}
            yield parts[4]

        def __len__(self):
            return 3

    def final(out, batches, k):
        run = Run(out, device="cpu", precision="fp32", grad_accum=k)
        torch.manual_seed(0)
        model = Plain()
        list(run.fit(model, batches, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))
        run.close()
        return model

    one, two = final(tmp_path / "a", Points(), 2), final(tmp_path / "b", Joined(), 1)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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
    with pytest.raises(RunError, match="no checkpoint was saved before"):
        train(tmp_path / "other", poison_at=1)


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
    held.close()
    with pytest.raises(RunDirectoryError, match="already holds an unfinished run; go on with --resume, choose"):
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
