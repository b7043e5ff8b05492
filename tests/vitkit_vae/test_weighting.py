import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkit import Run, losses
from vitkit.errors import UsageError
from vitkit_vae import REFERENCE_WEIGHTS, MultiTaskLoss


def parts(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


ALL = {"classification": 2.0, "triplet": 0.3, "reconstruction": 0.1, "kl": 5.0}


def test_fixed_weights_are_those_of_the_reference_document() -> None:
    found = losses.build("multitask")(parts(**ALL))
    torch.testing.assert_close(found["loss"], torch.tensor(0.5 * 2.0 + 1.0 * 0.3 + 1.0 * 0.1 + 0.01 * 5.0))
    assert {name: found[name].item() for name in ALL} == pytest.approx(ALL)


def test_what_is_not_given_or_weighs_nothing_does_not_count() -> None:
    loss = MultiTaskLoss({**REFERENCE_WEIGHTS, "kl": 0.0})
    torch.testing.assert_close(loss(parts(triplet=0.3, kl=5.0))["loss"], torch.tensor(0.3))


@pytest.mark.parametrize("value", [0.2, 3.0])
def test_learned_weights_start_at_the_given_and_end_at_the_inverse_of_twice_the_loss(value: float) -> None:
    loss = MultiTaskLoss({"classification": 0.5, "kl": 0.01}, "uncertainty")
    given = parts(classification=value, kl=2.0)
    first = loss(given)
    torch.testing.assert_close(first["loss"], torch.tensor(0.5 * value + 0.01 * 2.0 - 0.5 * math.log(0.5)))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss(given)["loss"].backward()
        optimizer.step()
    # d/ds of exp(−s)·L + ½·s is zero at exp(−s) = 1/(2L); kl keeps its weight.
    torch.testing.assert_close(loss(given)["weight_classification"], torch.tensor(1 / (2 * value)), rtol=1e-3, atol=0)
    assert list(loss.log_variances) == ["classification"]


def test_the_gradient_of_each_part_is_its_learned_weight() -> None:
    loss = MultiTaskLoss({"triplet": 2.0, "reconstruction": 0.25}, "uncertainty")
    given = parts(triplet=0.4, reconstruction=0.1)
    loss(given)["loss"].backward()
    assert {name: float(part.grad) for name, part in given.items()} == pytest.approx({"triplet": 2.0, "reconstruction": 0.25})


def test_progressive_brings_in_one_after_another() -> None:
    weights = {"classification": 1.0, "triplet": 10.0, "reconstruction": 100.0}
    loss = MultiTaskLoss(weights, "progressive", stage=4)
    totals = []
    for step in range(10):
        loss.set_step(step, 10)
        totals.append(loss(parts(classification=1.0, triplet=1.0, reconstruction=1.0))["loss"].item())
    triplet = [0.0, 2.5, 5.0, 7.5, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    reconstruction = [0.0, 0.0, 0.0, 0.0, 0.0, 25.0, 50.0, 75.0, 100.0, 100.0]
    assert totals == pytest.approx([1 + a + b for a, b in zip(triplet, reconstruction, strict=True)])


def test_the_divergence_warms_up_in_training_alone() -> None:
    loss = MultiTaskLoss({"kl": 2.0}, warmup=4)
    totals = []
    for step in range(6):
        loss.set_step(step, 6)
        totals.append(loss(parts(kl=1.0))["loss"].item())
    assert totals == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0])
    fresh = MultiTaskLoss({"kl": 2.0}, warmup=4).eval()
    assert [fresh(parts(kl=1.0))["loss"].item() for _ in range(2)] == [2.0, 2.0]


def test_a_fit_names_the_step_and_a_resumed_one_continues(tmp_path) -> None:
    class Divergence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.loss = nn.Parameter(torch.ones(1)), MultiTaskLoss({"kl": 2.0}, warmup=4)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.loss({"kl": 1.0 + 0 * self.weight.sum()})

    def trained(epochs: int, resume: bool = False) -> list[float]:
        run, model = Run(tmp_path / "run", device="cpu", precision="fp32", resume=resume), Divergence()
        batches, optimizer = [{"images": torch.ones(1, 1)}] * 2, torch.optim.SGD(model.parameters(), lr=0.1)
        fit = run.fit(model, batches, epochs=2, optimizer=optimizer)
        losses = [next(fit).losses["loss"] for _ in range(epochs)]
        run.close()
        return losses

    assert trained(1) == pytest.approx([0.25])  # the mean of 0 and 0.5
    assert trained(2, resume=True) == pytest.approx([0.25, 1.25])


def test_the_uninformed_total_is_the_weighted_sum_of_its_parts_where_weights_are_fixed() -> None:
    assert MultiTaskLoss().uninformed(8, ALL) == pytest.approx({**ALL, "loss": 0.5 * 2.0 + 0.3 + 0.1 + 0.01 * 5.0})
    assert MultiTaskLoss().uninformed(8, {"triplet": 0.2}) == {"triplet": 0.2}  # no total of some of the parts
    assert MultiTaskLoss(mode="uncertainty").uninformed(8, ALL) == ALL
    assert MultiTaskLoss(mode="progressive").uninformed(8, ALL) == ALL
    assert MultiTaskLoss().uninformed(8) == {}


def test_learned_weights_saved_with_no_dimension_still_load() -> None:
    loss = MultiTaskLoss(mode="uncertainty")
    assert {tuple(value.shape) for value in loss.parameters()} == {(1,)}
    old = {name: value.squeeze() + 0.5 for name, value in loss.state_dict().items() if name != "calls"}
    whole = nn.Sequential(loss)
    whole.load_state_dict({f"0.{name}": value for name, value in {**old, "calls": torch.tensor(3)}.items()})
    for name, value in old.items():
        torch.testing.assert_close(loss.state_dict()[name], value[None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiTaskLoss(mode="learned"), "mode is 'learned'; .*expected 'fixed', 'uncertainty', 'progressive'"),
        (lambda: MultiTaskLoss({"kl": -1.0}), "weights are {'kl': -1.0}; expected finite numbers of at least 0"),
        (lambda: MultiTaskLoss({"kl": 0.0}), "weights are {'kl': 0.0}; expected finite numbers of at least 0, one of them above 0"),
        (lambda: MultiTaskLoss(warmup=-1), "warmup is -1; expected at least 0"),
        (lambda: MultiTaskLoss()(parts(rotation=1.0)), "no weight for 'rotation'; weights: classification, triplet, recon"),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
