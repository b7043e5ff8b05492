"""Columns that the runner writes cannot be overwritten by a metric or by a part of the loss."""

import pytest

from vitkit.contracts import Measurement, Scores
from vitkit.errors import UsageError
from vitkit.runs.history import RESERVED, History, check_loss_names, check_metric_names


@pytest.mark.parametrize("name", RESERVED)
def test_a_metric_with_a_reserved_name_is_refused(name):
    with pytest.raises(UsageError) as refusal:
        check_metric_names(["top1", name])
    assert str(refusal.value) == (
        f"epoch.log got a metric named {name!r}: vitkit writes a column of that name itself; choose another name, "
        f"such as 'eval_{name}' (reserved: epoch, step, lr, loss, seconds, images_per_second)"
    )


@pytest.mark.parametrize("name", [name for name in RESERVED if name != "loss"])
def test_a_loss_part_with_a_reserved_name_is_refused(name):
    with pytest.raises(UsageError, match=f"the model returned a loss part named '{name}': .* choose another name, such as '{name}_loss'"):
        check_loss_names(["loss", name])


def test_other_names_pass():
    check_metric_names(["val_loss", "top1", "epochs"])
    check_loss_names(["loss", "invariance", "step_size"])


def test_the_best_value_follows_the_direction_that_came_with_the_scores():
    history = History()
    history.add_scores(Scores({"mse": 0.2}, protocols={"mse": Measurement("val", 10, kind="error")}))
    for epoch, mse in ((1, 0.5), (2, 0.2), (3, 0.4)):
        history.add_losses({"epoch": epoch, "step": epoch, "loss": 1.0, "images_per_second": 10.0})
        history.add_metrics({"epoch": epoch, "step": epoch, "mse": mse, "top1": mse})
    assert history.summary()["best"] == {"mse": {"value": 0.2, "epoch": 2}, "top1": {"value": 0.5, "epoch": 1}}
