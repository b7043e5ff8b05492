"""DINO, KoLeo, NT-Xent and BYOL: closed forms, lightly's implementations, limits, and what a collapse looks like."""

import math
from typing import Any

import pytest
import torch
from lightly.loss import DINOLoss as LightlyDINO
from lightly.loss import KoLeoLoss as LightlyKoLeo
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.loss.msn_loss import sinkhorn as lightly_sinkhorn
from torch import Tensor

from vitkit.errors import UsageError
from vitkit_ssl import BYOLLoss, DINOLoss, KoLeoLoss, NTXent, sinkhorn


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("views", "targets"), [(2, 2), (6, 2), (3, 1)])
def test_dino_with_a_moving_centre_is_that_of_lightly_over_several_steps(views: int, targets: int) -> None:
    ours = DINOLoss(16, centring="mean", teacher_temperature=0.06, centre_momentum=0.8)
    theirs = LightlyDINO(16, teacher_temp=0.06, center_momentum=0.8)
    for step in range(3):
        student, same = (gaussian(views, 5, 16, seed=step).requires_grad_() for _ in range(2))
        teacher = gaussian(targets, 5, 16, seed=10 + step) / 5
        value, reference = ours(student, teacher)["loss"], theirs(list(teacher), list(same))
        torch.testing.assert_close(value, reference)
        torch.testing.assert_close(*torch.autograd.grad(value, student), *torch.autograd.grad(reference, same))
        torch.testing.assert_close(ours.centre, theirs.center[0, 0])


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_that_of_lightly(iterations: int) -> None:
    logits = gaussian(12, 7) * 4
    torch.testing.assert_close(sinkhorn(logits, iterations), lightly_sinkhorn(logits.exp(), iterations))


def test_sinkhorn_makes_prototypes_equally_frequent_and_rows_sum_to_one() -> None:
    q = sinkhorn(gaussian(64, 8) * 3 + torch.arange(8.0) * 5, iterations=50)  # a strong preference for the last prototype
    torch.testing.assert_close(q.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(q.mean(dim=0), torch.full((8,), 1 / 8), rtol=1e-3, atol=1e-4)


def test_sinkhorn_is_finite_for_logits_far_apart() -> None:
    assert sinkhorn(torch.tensor([[1e4, -1e4], [1e4, -1e4]])).isfinite().all()


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_a_uniform_student_costs_ln_k(centring: Any) -> None:
    loss = DINOLoss(32, centring=centring)
    parts = loss(torch.zeros(3, 9, 32), gaussian(2, 9, 32) / 5)
    assert float(parts["loss"]) == pytest.approx(math.log(32), rel=1e-5)
    assert loss.uninformed(9) == dict.fromkeys(("loss", "teacher_entropy", "marginal_entropy"), math.log(32))


def test_the_entropies_tell_both_kinds_of_collapse_from_a_teacher_that_works() -> None:
    loss = DINOLoss(4, centring="mean", teacher_temperature=0.01).eval()
    point = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 8, 4)
    spread = torch.eye(4).repeat(2, 1).expand(2, 8, 4)
    for teacher, entropy, marginal in (
        (point, 0.0, 0.0), (torch.zeros(2, 8, 4), math.log(4), math.log(4)), (spread, 0.0, math.log(4))
    ):  # fmt: skip
        parts = loss(gaussian(2, 8, 4), teacher)
        assert float(parts["teacher_entropy"]) == pytest.approx(entropy, abs=1e-5)
        assert float(parts["marginal_entropy"]) == pytest.approx(marginal, abs=1e-5)


def test_the_same_crop_is_not_compared_with_itself() -> None:
    student = gaussian(2, 5, 8)
    teacher = gaussian(2, 5, 8, seed=1) / 5
    loss = DINOLoss(8, centring="mean").eval()
    q = (teacher / loss.temperature).softmax(-1)
    log_p = (student / 0.1).log_softmax(-1)
    expected = -(q[0] * log_p[1] + q[1] * log_p[0]).sum(-1).mean() / 2
    torch.testing.assert_close(loss(student, teacher)["loss"], expected)


def test_the_teachers_temperature_rises_in_the_warm_up() -> None:
    loss = DINOLoss(8, teacher_temperature=0.07, warmup_temperature=0.04, warmup=0.5)
    assert loss.temperature == 0.07
    seen = []
    for step in (0, 25, 50, 99):
        loss.set_step(step, 100)
        seen.append(loss.temperature)
    assert seen == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_the_centre_follows_in_training_mode_alone() -> None:
    loss = DINOLoss(8, centring="mean", centre_momentum=0.5)
    teacher = gaussian(2, 5, 8)
    loss(gaussian(2, 5, 8), teacher)
    torch.testing.assert_close(loss.centre, teacher.mean(dim=(0, 1)) / 2)
    before = loss.eval().centre.clone()
    loss(gaussian(2, 5, 8), teacher)
    assert torch.equal(loss.centre, before)


def test_koleo_is_that_of_lightly() -> None:
    ours, same = gaussian(9, 6).requires_grad_(), gaussian(9, 6).requires_grad_()
    value, reference = KoLeoLoss()(ours)["loss"], LightlyKoLeo()(same)
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(*torch.autograd.grad(value, ours), *torch.autograd.grad(reference, same))


def test_koleo_of_opposite_points_is_minus_ln_2_and_of_one_point_0() -> None:
    assert float(KoLeoLoss()(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))["loss"]) == pytest.approx(-math.log(2), abs=1e-6)
    assert float(KoLeoLoss()(torch.ones(1, 4))["loss"]) == 0.0


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_of_two_views_is_that_of_lightly(temperature: float) -> None:
    ours, same = gaussian(2, 9, 6).requires_grad_(), gaussian(2, 9, 6).requires_grad_()
    value, reference = NTXent(temperature)(ours)["loss"], NTXentLoss(temperature)(same[0], same[1])
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(*torch.autograd.grad(value, ours), *torch.autograd.grad(reference, same))


def test_nt_xent_of_equal_embeddings_is_what_uninformed_says() -> None:
    for views in (2, 3):
        assert float(NTXent()(torch.ones(views, 7, 4))["loss"]) == pytest.approx(NTXent().uninformed(7, views=views)["loss"], rel=1e-5)


def test_nt_xent_of_several_views_has_several_positives() -> None:
    z = torch.nn.functional.normalize(gaussian(3, 4, 5), dim=-1)
    rows = z.transpose(0, 1).flatten(0, 1)  # (12 5), three in a row for each image
    terms = []
    for i in range(12):
        others = [j for j in range(12) if j != i]
        log_p = (rows[i] @ rows[others].T / 0.2).log_softmax(dim=0)
        terms += [-log_p[others.index(j)] for j in others if j // 3 == i // 3]
    torch.testing.assert_close(NTXent(0.2)(z)["loss"], torch.stack(terms).mean())


def test_nt_xent_counts_the_views_whose_nearest_is_of_the_same_image() -> None:
    assert float(NTXent()(torch.eye(6).expand(2, 6, 6))["positive_top1"]) == 1.0
    assert float(NTXent()(torch.stack([torch.eye(6), torch.eye(6).roll(1, 0)]))["positive_top1"]) == 0.0


def test_byol_is_the_cosine_of_lightly_in_both_orders() -> None:
    q, z = gaussian(2, 7, 5).requires_grad_(), gaussian(2, 7, 5, seed=1).requires_grad_()
    similarity = NegativeCosineSimilarity()
    expected = 2 + similarity(q[0], z[1]) + similarity(q[1], z[0])
    value = BYOLLoss()(q, z)["loss"]
    torch.testing.assert_close(value, expected)
    assert torch.autograd.grad(value, [q, z], allow_unused=True)[1] is None
    assert float(BYOLLoss()(q.detach(), q.detach().flip(0))["loss"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", [DINOLoss(8), DINOLoss(8, centring="mean"), KoLeoLoss(), NTXent(), BYOLLoss()])
def test_losses_compute_in_fp32_under_autocast(loss: Any) -> None:
    inputs = type(loss).vitkit_example(6)[1]
    full = loss.eval()(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(**inputs)
    for name, value in full.items():
        assert torch.equal(value, mixed[name])


WRONG: dict[str, tuple[Any, str]] = {
    "dim": (lambda: DINOLoss(8)(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), "expected (s, n, 8) of the student and (t, n, 8)"),
    "targets": (lambda: DINOLoss(8)(torch.zeros(2, 3, 8), torch.zeros(3, 3, 8)), "outputs are (2, 3, 8) and (3, 3, 8)"),
    "one view": (lambda: DINOLoss(8)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)), "two views or more of the student"),
    "centring": (lambda: DINOLoss(8, centring="median"), "centring is 'median'; did you mean 'mean'? expected 'mean', 'sinkhorn'"),
    "temperature": (lambda: DINOLoss(8, student_temperature=0.0), "student_temperature is 0.0; expected a finite positive number"),
    "warmup": (lambda: DINOLoss(8, warmup=2.0), "warmup is 2.0; expected a number in [0, 1]"),
    "koleo": (lambda: KoLeoLoss()(torch.zeros(2, 3, 4)), "features are (2, 3, 4); expected (samples, dimensions)"),
    "nt_xent": (lambda: NTXent()(torch.zeros(1, 3, 4)), "projections are (1, 3, 4); expected (views, samples, dim) with two views or more"),
    "nt_xent temperature": (lambda: NTXent(0.0), "temperature is 0.0; expected a finite positive number"),
    "byol": (lambda: BYOLLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), "predictions are (2, 3, 4) and targets (2, 3, 5)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_say_what_was_expected(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)
