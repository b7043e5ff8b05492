"""What a fit counts, refuses and keeps: steps, a second fit, metrics that are not finite, the best weights, plain loaders."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vitkit import Run
from vitkit.errors import UsageError
from vitkit.training.batches import LoaderBatches
from vitkit.training.run import DryRun


class Line(nn.Module):
    def __init__(self, stop_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.calls, self.stop_at = nn.Linear(3, 1), 0, stop_at

    def forward(self, batch):
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": (self.net(batch["images"])[:, 0] - batch["labels"]).square().mean()}


def points(count=4):
    x = torch.randn(count, 8, 3, generator=torch.Generator().manual_seed(1))
    return [{"images": part, "labels": part.sum(1)} for part in x]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def scored(out, values, *, seen=None, **options):
    """Train with these values of a metric; the numbers of the epochs, the run and its model."""
    run, model, numbers = Run(out, device="cpu", precision="fp32"), Line(), []
    fit = run.fit(model, points(), epochs=len(values), optimizer=sgd(model), monitor="top1", **options)
    for epoch in fit:
        numbers.append(epoch.number)
        epoch.log(top1=values[epoch.number - 1])
        if seen is not None:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
    return numbers, run, model


@pytest.mark.parametrize(("k", "steps"), [(1, 5), (2, 3), (5, 1), (7, 1)])
def test_the_steps_that_a_schedule_counts_are_those_that_are_taken(tmp_path, k, steps):
    run, model = Run(tmp_path / "run", device="cpu", precision="fp32", grad_accum=k), Line()
    assert run.steps(points(5)) == steps
    taken = [epoch.step for epoch in run.fit(model, points(5), epochs=2, optimizer=sgd(model))]
    run.close()
    assert taken == [steps, run.steps(points(5), 2)]


def test_a_schedule_of_nothing_is_told_by_what_is_missing(tmp_path):
    run = Run(tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match="epochs is 0; expected at least 1"):
        run.steps(points(), 0)
    with pytest.raises(UsageError, match="an epoch has no batches: the batch size is larger than the training set"):
        run.steps([])
    with pytest.raises(UsageError, match=r"give it batches with len\(\)"):
        run.steps(iter(points()))
    run.discard()


def test_a_second_fit_of_a_run_is_refused_and_the_first_ones_rows_stay(tmp_path):
    run, model = Run(tmp_path / "run", device="cpu", precision="fp32"), Line()
    with pytest.raises(UsageError, match="epochs is 0"):  # one that never began is none
        run.fit(model, points(), epochs=0, optimizer=sgd(model))
    for epoch in run.fit(model, points(), epochs=3, optimizer=sgd(model)):
        epoch.log(top1=0.1 * epoch.number)
    with pytest.raises(UsageError, match="run.fit was called before in this run; .* To train in stages, change the training"):
        run.fit(model, points(), epochs=2, optimizer=sgd(model))
    run.close()
    for name in ("losses.csv", "metrics.csv"):
        assert len((tmp_path / "run" / name).read_text().splitlines()) == 4


NAN, INF = float("nan"), float("inf")


def test_a_metric_that_is_not_finite_is_never_best(tmp_path):
    numbers, run, _ = scored(tmp_path / "run", [NAN, 0.2, 0.3, 0.4, INF, 0.5], patience=3)
    run.finish()
    assert numbers == [1, 2, 3, 4, 5, 6]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"]["top1"] == {"value": 0.5, "epoch": 6}


def test_a_metric_that_is_not_finite_is_no_improvement(tmp_path):
    numbers, run, model = scored(tmp_path / "run", [NAN, NAN, 0.1], patience=2)
    assert numbers == [1, 2]
    assert "stopping early: top1 was not finite for 2 evaluations" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(UsageError, match=r"no best checkpoint was kept: give run.fit monitor='METRIC'"):
        run.load_best(model)
    run.close()
    numbers, run, _ = scored(tmp_path / "other", [0.3, NAN, -INF, 0.4], patience=2)
    run.close()
    assert numbers == [1, 2, 3]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_best_weights_can_be_had_as_they_were_evaluated(tmp_path, ema):
    seen = []
    _, run, model = scored(tmp_path / "run", [0.1, 0.9, 0.3, 0.2, 0.5], seen=seen, ema=ema, patience=2)
    assert torch.equal(model.net.weight, seen[-1]["net.weight"])
    assert not torch.equal(seen[1]["net.weight"], seen[-1]["net.weight"])
    assert run.load_best(model) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[1][name])
    with pytest.raises(UsageError, match="belongs to another model: .* give load_best the model that run.fit trained"):
        run.load_best(nn.Linear(2, 2))
    run.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"monitor": "top1", "patience": 0}, "patience is 0; expected at least 1"),
        ({"ema": 0.0}, "ema is 0.0; expected a decay between 0 and 1"),
        ({"ema": 1.0}, "ema is 1.0; expected a decay between 0 and 1"),
        ({"clip": -1.0}, "clip is -1.0; expected a positive gradient norm"),
        ({"mode": "best"}, "mode is 'best'; expected 'max', 'min' or None"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, options, text):
    run, model = Run(tmp_path / "run", device="cpu", dry_run=True), Line()
    with pytest.raises(UsageError, match=text):
        run.fit(model, points(), **{"epochs": 1, "optimizer": sgd(model), **options})
    with pytest.raises(DryRun):
        run.fit(model, points(), epochs=1, optimizer=sgd(model))


class Noisy(Dataset):
    """Points with noise from the global generators."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        noise = torch.randn(3) + random.gauss(0, 1) + float(np.random.randn())
        return {"images": noise + index / 10, "labels": torch.tensor(index / 10)}


@pytest.mark.parametrize("call", [2, 4, 9])
def test_a_plain_loader_that_draws_from_global_generators_goes_on_bit_for_bit(tmp_path, call):
    def trained(out, stop_at=None, resume=False):
        run = Run(out, device="cpu", precision="fp32", resume=resume)
        model = Line(stop_at)
        try:
            for _ in run.fit(model, DataLoader(Noisy(), batch_size=4, shuffle=True), epochs=2, optimizer=sgd(model)):
                torch.rand(3)  # what a recipe draws in between changes nothing
        finally:
            run.close()
        return model.net.weight

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop_at=call)
    assert torch.equal(whole, trained(tmp_path / "cut", resume=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_entered_anywhere_gives_what_it_would_have_given(workers):
    def batches(start):
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
        return [batch["images"] for batch in LoaderBatches(loader).epoch(1, seed=3, start=start)]

    whole = batches(0)
    assert len(whole) == 6
    torch.testing.assert_close(batches(4), whole[4:], rtol=0, atol=0)


def test_a_plain_loader_leaves_the_global_generators_where_they_were():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    list(LoaderBatches(DataLoader(Noisy(), batch_size=4)).epoch(0))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
