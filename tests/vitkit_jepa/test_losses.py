"""SIGReg and LeJEPA: closed forms, lightly's implementation, limits, invariances, two ranks."""

import math
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightly.loss.lejepa_loss import LeJEPALoss as LightlyLoss
from lightly.loss.lejepa_loss import SIGReg as LightlySIGReg
from torch import Tensor

from vitkit import losses
from vitkit.errors import UsageError
from vitkit_jepa import LeJEPALoss, SIGReg

FLOOR, COLLAPSE = 1.0525, 0.4020


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["lejepa", "sigreg"])
def test_registered_losses_return_loss_and_parts(name: str) -> None:
    parts = losses.build(name)(gaussian(2, 16, 8))
    assert parts["loss"].ndim == 0
    assert "sigreg" in parts


@pytest.mark.parametrize("n", [64, 1000])
def test_gaussian_embeddings_stand_at_the_floor_whatever_their_number(n: int) -> None:
    torch.manual_seed(0)
    values = torch.stack([SIGReg(1024)(gaussian(8, n, 64, seed=seed))["loss"] for seed in range(12)])
    assert values.mean().item() == pytest.approx(FLOOR, abs=0.02)


@pytest.mark.parametrize("n", [10, 250])
def test_collapsed_embeddings_cost_their_number(n: int) -> None:
    assert SIGReg()(torch.zeros(1, n, 5))["loss"].item() == pytest.approx(COLLAPSE * n, rel=1e-3)


def test_the_floor_and_the_value_of_collapsed_embeddings_are_stated() -> None:
    loss = SIGReg()
    assert loss.floor == pytest.approx(FLOOR, abs=5e-5)
    assert loss.uninformed(128) == pytest.approx({"loss": COLLAPSE * 128, "sigreg": COLLAPSE * 128}, rel=1e-3)
    for kind in (SIGReg(knots=9, limit=4.0), LeJEPALoss(0.3)):
        parts = {name: float(value) for name, value in kind(torch.zeros(2, 12, 5)).items()}
        assert kind.uninformed(12) == pytest.approx(parts, rel=1e-5)


def test_collapse_is_the_trapezoid_of_the_written_formula() -> None:
    t = [3 * j / 16 for j in range(17)]
    w = [2 * 3 / 16 * (0.5 if j in (0, 16) else 1) * math.exp(-s * s / 2) for j, s in enumerate(t)]
    expected = 7 * sum(wj * (1 - math.exp(-s * s / 2)) ** 2 for wj, s in zip(w, t, strict=True))
    assert SIGReg()(torch.zeros(7, 3))["loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 33, 16), (3, 64, 8)])
def test_agrees_with_lightly_on_the_same_directions(shape: tuple[int, int, int]) -> None:
    ours, theirs = gaussian(*shape).mul(1.7).requires_grad_(), gaussian(*shape).mul(1.7).requires_grad_()
    torch.manual_seed(3)
    value = SIGReg(directions=40, knots=9, limit=4.0)(ours)["loss"]
    torch.manual_seed(3)
    reference = LightlySIGReg(num_vectors=40, knots=9, t_max=4.0)(theirs)
    torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*torch.autograd.grad(value, ours), *torch.autograd.grad(reference, theirs))


@pytest.mark.parametrize("lamda", [0.0, 0.05, 0.5, 1.0])
def test_lejepa_agrees_with_lightly(lamda: float) -> None:
    z, same = gaussian(4, 32, 16).requires_grad_(), gaussian(4, 32, 16).requires_grad_()
    torch.manual_seed(5)
    value = LeJEPALoss(lamda, directions=30)(z)["loss"]
    torch.manual_seed(5)
    # lightly's centre is the mean of the views called global, and it asks for at least one local view: with the mean
    # view for that one, whose own distance to the centre is zero, its invariance is ours times v/(v + 1).
    views = same.shape[0]
    invariance = LightlyLoss(0.0, sigreg_num_vectors=30)(
        local_proj=same.mean(0, keepdim=True), global_proj=same
    )
    torch.manual_seed(5)
    sigreg = LightlySIGReg(num_vectors=30)(same)
    reference = (1 - lamda) * invariance * (views + 1) / views + lamda * sigreg
    torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*torch.autograd.grad(value, z), *torch.autograd.grad(reference, same))


def test_limits_of_lamda_are_the_parts() -> None:
    z = gaussian(3, 16, 8)
    for lamda, part in ((0.0, "invariance"), (1.0, "sigreg")):
        parts = LeJEPALoss(lamda)(z)
        assert torch.equal(parts["loss"], parts[part])


def test_equal_views_have_no_invariance_loss_and_order_of_views_and_samples_is_nothing() -> None:
    z = gaussian(3, 16, 8)
    assert LeJEPALoss(0.0)(z[:1].expand(3, -1, -1))["loss"].item() == pytest.approx(0.0, abs=1e-12)
    torch.manual_seed(0)
    first = LeJEPALoss()(z)
    torch.manual_seed(0)
    second = LeJEPALoss()(z.flip(0)[:, torch.randperm(16, generator=torch.Generator().manual_seed(1))])
    for part in first:
        torch.testing.assert_close(first[part], second[part])


def test_directions_are_drawn_anew_each_call_and_follow_the_seed() -> None:
    z, loss = gaussian(64, 8), SIGReg(4)
    torch.manual_seed(0)
    first, second = loss(z)["loss"], loss(z)["loss"]
    torch.manual_seed(0)
    assert first != second
    assert loss(z)["loss"] == first


def test_absent_views_count_as_not_given() -> None:
    z = gaussian(2, 12, 4).requires_grad_()
    present = torch.ones(2, 12, dtype=torch.bool)
    present[1, 5:] = False
    torch.manual_seed(0)
    masked = SIGReg(16)(z, present=present)["loss"]
    torch.manual_seed(0)
    first = SIGReg(16)(z[0])["loss"]
    torch.manual_seed(0)
    second = SIGReg(16)(z[1, :5])["loss"]
    torch.testing.assert_close(masked, (first + second) / 2)
    (gradient,) = torch.autograd.grad(LeJEPALoss()(z, present=present)["loss"], z)
    assert (gradient[1, 5:] == 0).all()
    assert (gradient[1, :5] != 0).any()


def test_a_view_that_nobody_has_counts_as_none() -> None:
    z = gaussian(2, 12, 4)
    present = torch.tensor([[True], [False]]).expand(2, 12)
    for lamda in (0.0, 0.5):
        torch.manual_seed(0)
        masked = LeJEPALoss(lamda)(z, present=present)["loss"]
        torch.manual_seed(0)
        torch.testing.assert_close(masked, LeJEPALoss(lamda)(z[:1])["loss"])


def test_unregularised_views_leave_sigreg_alone() -> None:
    z = gaussian(3, 16, 8)
    torch.manual_seed(0)
    part = LeJEPALoss()(z, regularised=2)["sigreg"]
    torch.manual_seed(0)
    assert torch.equal(part, SIGReg()(z[:2])["sigreg"])


def test_gradient_stays_finite_far_from_the_origin() -> None:
    far = (gaussian(2, 64, 8) * 1e3).requires_grad_()
    assert torch.autograd.grad(LeJEPALoss()(far)["loss"], far)[0].isfinite().all()


def test_descending_sigreg_makes_embeddings_gaussian() -> None:
    torch.manual_seed(0)
    z = (gaussian(256, 4) * 0.1 + 1).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        SIGReg(32)(z)["loss"].backward()
        optimizer.step()
    assert z.mean(0).abs().max().item() < 0.15
    torch.testing.assert_close(torch.cov(z.detach().T), torch.eye(4), rtol=0, atol=0.2)


def test_phases_are_fp32_under_autocast() -> None:
    z = gaussian(2, 64, 16)
    torch.manual_seed(0)
    full = LeJEPALoss()(z)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = LeJEPALoss()(z)
    for part in full:
        assert torch.equal(full[part], mixed[part])
        assert mixed[part].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SIGReg(0), "directions is 0; expected at least 1"),
        (lambda: SIGReg(knots=1), "knots is 1; expected at least 2"),
        (lambda: SIGReg(limit=0.0), "limit is 0.0; expected a finite positive number"),
        (lambda: LeJEPALoss(1.5), r"lamda is 1.5; expected a number in \[0, 1\]"),
        (
            lambda: LeJEPALoss()(torch.zeros(4, 2)),
            r"projections are \(4, 2\), expected \(views, samples, dim\)",
        ),
        (lambda: SIGReg()(torch.zeros(4)), r"projections are \(4,\), expected \(views, samples, dim\)"),
        (
            lambda: SIGReg()(torch.zeros(1, 4, 2), present=torch.ones(4)),
            r"present is \(4,\), expected .* = \(1, 4\)",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def _worker(number: int, folder: str, x: Tensor, weight: Tensor, present: Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2
    )
    results = {}
    for name, sizes in (("even", (8, 8)), ("uneven", (11, 5))):
        part, mask = x.split(sizes, dim=1)[number], present.split(sizes, dim=1)[number]
        torch.manual_seed(40 + number)  # the runner seeds each rank differently; directions must be rank 0's
        results[name] = _losses(part, mask, weight)
    torch.save(results, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def _losses(x: Tensor, present: Tensor, weight: Tensor) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    found = {}
    for name, loss in (
        ("sigreg", SIGReg(16)),
        ("lejepa", LeJEPALoss(directions=16)),
        ("masked", LeJEPALoss(0.3)),
    ):
        w = weight.clone().requires_grad_()
        parts = loss(x @ w, present=present if name == "masked" else None)
        gradient = torch.autograd.grad(parts["loss"], w)[0]
        found[name] = ({part: value.detach() for part, value in parts.items()}, gradient)
    return found


def test_two_ranks_give_the_loss_and_gradient_of_one(tmp_path: Any) -> None:
    x, weight = gaussian(3, 16, 6), gaussian(6, 4, seed=1)
    present = gaussian(3, 16, seed=2) > -0.3
    mp.spawn(_worker, (str(tmp_path), x, weight, present), nprocs=2)
    results = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    torch.manual_seed(40)
    expected = _losses(x, present, weight)
    for sizes in ("even", "uneven"):
        for name, (parts, gradient) in expected.items():
            for result in results:
                torch.testing.assert_close(result[sizes][name][0], parts, rtol=1e-5, atol=1e-5)
            averaged = (results[0][sizes][name][1] + results[1][sizes][name][1]) / 2
            torch.testing.assert_close(averaged, gradient, rtol=1e-5, atol=1e-5)
