"""The metric that is monitored: its split, its direction, and optimisers and schedules that cannot be stepped."""

import pytest
import torch
from torch import nn

from vitkit import Run, Scores
from vitkit.contracts import Measurement
from vitkit.errors import UsageError


class Line(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        self.net = layer or nn.Linear(3, 1)

    def forward(self, batch):
        return {"loss": self.net(batch["images"]).square().mean()}


BATCHES = [{"images": torch.ones(4, 3)}] * 2


def monitored(out, metric, values, *, protocol=None, **options):
    """Train with these values of a metric; the epoch of the best one."""
    run, model = Run(out, device="cpu", precision="fp32"), Line()
    try:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for epoch in run.fit(model, BATCHES, epochs=len(values), optimizer=optimizer, monitor=metric, **options):
            protocols = {} if protocol is None else {metric: protocol}
            epoch.log(Scores({metric: values[epoch.number - 1]}, protocols=protocols))
        return run.load_best(model)
    finally:
        run.close()


@pytest.mark.parametrize(
    ("protocol", "best"),
    [
        (Measurement("val", 10, kind="proportion"), 2),
        (Measurement("val", 10, kind="error"), 3),
        (Measurement("val", 10, kind="score", direction="min"), 3),
    ],
)
def test_the_direction_is_the_metrics_own(tmp_path, protocol, best):
    assert monitored(tmp_path / "run", "val_mse", [0.5, 0.7, 0.1], protocol=protocol) == best


@pytest.mark.parametrize(("mode", "best"), [(None, 2), ("max", 2), ("min", 3)])
def test_a_number_without_a_protocol_has_the_mode_that_is_given(tmp_path, mode, best):
    assert monitored(tmp_path / "run", "mse", [0.5, 0.7, 0.1], mode=mode) == best


@pytest.mark.parametrize("split", ["test", "train"])
def test_selection_on_another_split_than_val_is_refused(tmp_path, split):
    with pytest.raises(UsageError, match=f"monitor='top1' was measured on the {split} split; select on the validation split"):
        monitored(tmp_path / "run", "top1", [0.5], protocol=Measurement(split, 10))


def test_a_mode_against_the_metrics_direction_is_refused(tmp_path):
    with pytest.raises(UsageError, match="mode is 'max', but 'val_mse' is better at its min; leave mode out"):
        monitored(tmp_path / "run", "val_mse", [0.5], protocol=Measurement("val", 10, kind="error"), mode="max")


def test_a_metric_that_was_not_logged_is_named(tmp_path):
    run, model = Run(tmp_path / "run", device="cpu", precision="fp32"), Line()
    with pytest.raises(UsageError, match="monitor='top1' was not logged; logged: top5"):
        for epoch in run.fit(model, BATCHES, epochs=1, optimizer=torch.optim.SGD(model.parameters(), 0.1), monitor="top1"):
            epoch.log(top5=1.0)
    run.close()


@pytest.mark.parametrize("name", ["epoch", "step", "lr", "loss", "seconds", "images_per_second"])
def test_names_of_the_runners_columns_are_refused_at_the_first_log(tmp_path, name):
    run, model = Run(tmp_path / "run", device="cpu", precision="fp32"), Line()
    with pytest.raises(UsageError, match=f"epoch.log got a metric named '{name}': vitkit writes a column of that name itself"):
        for epoch in run.fit(model, BATCHES, epochs=1, optimizer=torch.optim.SGD(model.parameters(), 0.1)):
            epoch.log(**{name: 1.0})
    run.close()
    assert not (tmp_path / "run" / "metrics.csv").exists()


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("layer", "make", "schedule", "message"),
    [
        (None, torch.optim.LBFGS, None, "LBFGS computes the loss several times a step; run.fit computes it once: take AdamW"),
        (None, torch.optim.SGD, plateau, r"ReduceLROnPlateau needs a metric; .* call plateau.step\(epoch.losses\['loss'\]\) in the loop"),
        ("lazy", torch.optim.SGD, None, "net.weight, net.bias of Line has no shape yet: call the model once with a batch"),
    ],
)
def test_what_the_loop_cannot_step_is_refused_in_a_sentence(tmp_path, layer, make, schedule, message):
    run, model = Run(tmp_path / "run", device="cpu"), Line(nn.LazyLinear(1) if layer else None)
    optimizer = make(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=message):
        run.fit(model, BATCHES, epochs=1, optimizer=optimizer, schedule=schedule and schedule(optimizer))
    run.close()
