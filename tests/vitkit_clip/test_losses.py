"""The contrastive losses: closed forms, open_clip's implementations, limits, equal captions, half precision."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

import vitkit
from vitkit import losses
from vitkit.errors import UsageError
from vitkit.models import saving
from vitkit_clip import FocalNCE, HardNegativeNCE, InfoNCE, MarginTriplet, PairMultiTask, SigLIP

N, T = 6, 0.07
TEMPERED = (InfoNCE, FocalNCE, HardNegativeNCE)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return gaussian(N, 8), gaussian(N, 8, seed=1)


@pytest.mark.parametrize(
    "name", ["info_nce", "siglip", "hard_negative_nce", "focal_nce", "margin_triplet", "pair_multi_task"]
)
def test_each_is_registered(name: str) -> None:
    assert losses.build(name).spec.name == name


def test_info_nce_is_open_clips_loss(pair: tuple[Tensor, Tensor]) -> None:
    image, text = (F.normalize(x, dim=1) for x in pair)
    theirs = ClipLoss()(image, text, torch.tensor(1 / T))
    found = InfoNCE(T)(*pair)
    torch.testing.assert_close(found["loss"], theirs)
    torch.testing.assert_close(found["loss"], (found["image_to_text"] + found["text_to_image"]) / 2)
    distinct = InfoNCE(T)(*pair, labels=torch.tensor([7, 3, 0, 9, 4, 1]))
    torch.testing.assert_close(distinct["loss"], theirs)


def test_siglip_is_open_clips_loss(pair: tuple[Tensor, Tensor]) -> None:
    image, text = (F.normalize(x, dim=1) for x in pair)
    theirs = SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    torch.testing.assert_close(SigLIP()(*pair)["loss"], theirs)


def test_gradients_are_open_clips(pair: tuple[Tensor, Tensor]) -> None:
    image, text = (x.clone().requires_grad_() for x in pair)
    loss = InfoNCE(T, learned=True)
    ours = torch.autograd.grad(loss(image, text)["loss"], (image, text, loss.log_scale))
    log_scale = torch.tensor([-math.log(T)], requires_grad=True)
    theirs = ClipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), log_scale.exp())
    for one, other in zip(ours, torch.autograd.grad(theirs, (image, text, log_scale)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", [InfoNCE(T), HardNegativeNCE(T, beta=0.7), HardNegativeNCE(T, beta=0.7, tau=0.1)])
def test_embeddings_at_one_point_cost_log_n(loss: Any) -> None:
    same = torch.ones(N, 4)
    assert loss(same, same)["loss"].item() == pytest.approx(math.log(N), rel=1e-5)


def test_orthogonal_pairs_cost_what_the_temperature_says() -> None:
    eye = torch.eye(N)
    expected = math.log(1 + (N - 1) * math.exp(-1 / 0.5))
    assert InfoNCE(0.5)(eye, eye)["loss"].item() == pytest.approx(expected, rel=1e-5)
    wrong = (N - 1) * math.exp(-1 / 0.5) / (1 + (N - 1) * math.exp(-1 / 0.5))
    focal = FocalNCE(0.5, gamma=2.0)(eye, eye)["loss"].item()
    assert focal == pytest.approx(wrong**2 * -math.log(1 - wrong), rel=1e-4)


def test_siglip_of_cosines_zero_has_a_closed_form() -> None:
    zero = torch.zeros(N, 4)
    expected = math.log1p(math.exp(2.0)) + (N - 1) * math.log1p(math.exp(-2.0))
    assert SigLIP(bias=-2.0)(zero, zero)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_equal_captions_are_positives(pair: tuple[Tensor, Tensor]) -> None:
    labels = torch.tensor([0, 1, 0, 2, 3, 1])
    image, text = (F.normalize(x, dim=1) for x in pair)
    logits = image @ text.T / T
    expected = 0.0
    for scores in (logits, logits.T):
        for i in range(N):
            positives = [j for j in range(N) if labels[j] == labels[i]]
            expected -= sum(float(scores[i].log_softmax(0)[j]) for j in positives) / len(positives) / (2 * N)
    assert InfoNCE(T)(*pair, labels=labels)["loss"].item() == pytest.approx(expected, rel=1e-5)
    signs = torch.where(labels[:, None] == labels, 1.0, -1.0)
    theirs = -F.logsigmoid(signs * (10 * image @ text.T - 10)).sum() / N
    torch.testing.assert_close(SigLIP()(*pair, labels=labels)["loss"], theirs)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 3, 1])])
def test_without_their_weights_they_are_info_nce(pair: tuple[Tensor, Tensor], labels: Tensor | None) -> None:
    expected = InfoNCE(T)(*pair, labels=labels)["loss"]
    torch.testing.assert_close(FocalNCE(T, gamma=0.0)(*pair, labels=labels)["loss"], expected)
    torch.testing.assert_close(HardNegativeNCE(T, beta=0.0)(*pair, labels=labels)["loss"], expected)


@pytest.mark.parametrize(("beta", "tau"), [(0.5, 0.0), (1.0, 0.1), (2.0, 0.3)])
def test_hard_negatives_weigh_as_in_the_paper(pair: tuple[Tensor, Tensor], beta: float, tau: float) -> None:
    """Robinson et al., arXiv 2010.04592, equation 4 with importance weights, written down as it stands."""
    image, text = (F.normalize(x.double(), dim=1) for x in pair)
    t, total = 0.5, 0.0
    for scores in ((image @ text.T / t).exp(), (text @ image.T / t).exp()):
        for i in range(N):
            negatives = torch.cat([scores[i, :i], scores[i, i + 1 :]])
            weighted = (negatives**beta * negatives).sum() / (negatives**beta).mean()
            g = (weighted - tau * (N - 1) * scores[i, i]) / (1 - tau)
            g = g.clamp(min=(N - 1) * math.exp(-1 / t))
            total += float(-(scores[i, i] / (scores[i, i] + g)).log())
    found = HardNegativeNCE(t, beta=beta, tau=tau)(*pair)["loss"].item()
    assert found == pytest.approx(total / (2 * N), rel=1e-5)


def test_with_a_large_beta_the_nearest_negative_is_all_of_them(pair: tuple[Tensor, Tensor]) -> None:
    image, text = (F.normalize(x, dim=1) for x in pair)
    logits = image @ text.T
    others = logits.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf)
    rows = [torch.log1p((N - 1) * (s.amax(1) - logits.diagonal()).exp()).mean() for s in (others, others.T)]  # 1/T = 1
    found = HardNegativeNCE(1.0, beta=2000.0)(*pair)["loss"]
    torch.testing.assert_close(found, (rows[0] + rows[1]) / 2, rtol=1e-3, atol=1e-3)


def test_triplets_of_all_negatives_are_torchs(pair: tuple[Tensor, Tensor]) -> None:
    image, text = pair
    i, j = (~torch.eye(N, dtype=torch.bool)).nonzero().unbind(1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a, b, dim=1)

    theirs = [
        F.triplet_margin_with_distance_loss(a[i], b[i], b[j], distance_function=distance, margin=0.3)
        for a, b in ((image, text), (text, image))
    ]
    found = MarginTriplet(0.3, hardest=False)(image, text)
    torch.testing.assert_close(found["loss"], (theirs[0] + theirs[1]) / 2)


def test_triplets_have_closed_forms_and_a_limit(pair: tuple[Tensor, Tensor]) -> None:
    eye = torch.eye(N)
    for hardest in (True, False):
        assert MarginTriplet(0.4, hardest)(torch.ones(N, 3), torch.ones(N, 3))["loss"].item() == pytest.approx(0.4)
        assert MarginTriplet(1.0, hardest)(eye, eye)["loss"].item() == pytest.approx(0.0)  # apart by the margin
        same = MarginTriplet(0.4, hardest)(*pair, labels=torch.zeros(N, dtype=torch.int64))
        assert same["loss"].item() == 0.0  # nobody is a negative
    assert MarginTriplet(0.4)(*pair)["loss"] > MarginTriplet(0.4, hardest=False)(*pair)["loss"]


def test_the_multi_task_form_adds_the_cross_entropy_of_halves(pair: tuple[Tensor, Tensor]) -> None:
    labels, logits = torch.arange(N), gaussian(N, 2, 5, seed=2)
    classes = torch.arange(2 * N).view(N, 2) % 5
    alone = InfoNCE(T)(*pair, labels=labels)["loss"]
    entropy = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), label_smoothing=0.1)
    given = (*pair, labels, logits, classes)
    found = PairMultiTask(weight=0.5, label_smoothing=0.1, arguments={"temperature": T})(*given)
    torch.testing.assert_close(found["classification"], entropy)
    torch.testing.assert_close(found["loss"], alone + 0.5 * entropy)
    torch.testing.assert_close(PairMultiTask(weight=0.0)(*given)["loss"], alone)
    flat = PairMultiTask()(*pair, labels, torch.zeros(N, 2, 5), classes)
    assert flat["classification"].item() == pytest.approx(math.log(5))


def test_a_model_saved_with_parameters_of_no_dimension_still_loads(tmp_path: Path) -> None:
    loss: Any = losses.build("siglip")
    loss.log_scale, loss.bias = torch.nn.Parameter(torch.tensor(1.5)), torch.nn.Parameter(torch.tensor(-7.0))
    saving.save(tmp_path, {"loss": loss}, preprocessing={}, classes=[], arguments={})
    loaded = vitkit.load(tmp_path).loss
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {"log_scale": [1.5], "bias": [-7.0]}


ALL = (InfoNCE(), FocalNCE(), FocalNCE(gamma=0.5), HardNegativeNCE(tau=0.1), MarginTriplet(0.3), MarginTriplet(0.3, hardest=False))


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("n", [1, 2, N])
def test_the_uninformed_values_are_those_of_embeddings_that_are_all_the_same(loss: Any, n: int) -> None:
    image, text = gaussian(1, 4).expand(n, -1), gaussian(1, 4, seed=1).expand(n, -1)
    found = {name: float(value) for name, value in loss(image, text).items()}
    assert loss.uninformed(n) == pytest.approx(found, rel=1e-4, abs=1e-5)


def test_siglip_s_uninformed_value_is_the_lowest_that_a_constant_reaches() -> None:
    zero = torch.zeros(N, 4)
    values = [float(SigLIP(bias=bias)(zero, zero)["loss"].detach()) for bias in torch.linspace(-5, 2, 500).tolist()]
    assert SigLIP().uninformed(N)["loss"] == pytest.approx(min(values), rel=1e-4)
    best = SigLIP(bias=-math.log(N - 1))(zero, zero)
    assert SigLIP().uninformed(N)["siglip"] == pytest.approx(float(best["siglip"].detach()), rel=1e-5)
    assert SigLIP().uninformed(1)["loss"] == 0.0


def test_the_multi_task_form_states_the_uninformed_values_of_both() -> None:
    loss = PairMultiTask(weight=0.5)
    log_n = math.log(N)
    assert loss.uninformed(N) == pytest.approx({"image_to_text": log_n, "text_to_image": log_n})
    stated = loss.uninformed(N, num_classes=5)
    assert stated["classification"] == pytest.approx(math.log(5))
    assert stated["loss"] == pytest.approx(log_n + 0.5 * math.log(5))
    same = torch.ones(N, 4)
    found = loss(same, same, torch.arange(N), torch.zeros(N, 2, 5), torch.zeros(N, 2, dtype=torch.int64))
    assert stated == pytest.approx({name: float(value) for name, value in found.items()}, rel=1e-5)


@pytest.mark.parametrize("loss", [InfoNCE(learned=True), FocalNCE(learned=True), HardNegativeNCE(learned=True), SigLIP()])
def test_parameters_saved_with_no_dimension_still_load(loss: Any) -> None:
    state = {name: torch.tensor(0.75) for name in loss.state_dict()}
    torch.nn.Sequential(loss).load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert all(value.shape == (1,) and float(value) == 0.75 for value in loss.state_dict().values())
    assert copy.deepcopy(loss).load_state_dict(state) is not None


@pytest.mark.parametrize(
    "loss", [*(kind(0.01) for kind in TEMPERED), HardNegativeNCE(0.01, beta=50.0, tau=0.1), SigLIP(0.01)]
)
def test_the_smallest_temperature_stays_finite_under_bf16(loss: Any) -> None:
    x = gaussian(16, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x.bfloat16(), -x.bfloat16())["loss"]
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize(
    "loss", [InfoNCE(learned=True), FocalNCE(learned=True), HardNegativeNCE(learned=True), SigLIP()]
)
def test_a_learned_temperature_is_clamped(loss: Any) -> None:
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    found = loss(gaussian(4, 3), gaussian(4, 3))
    assert found["temperature"].item() == pytest.approx(0.01)
    found["loss"].backward()
    assert loss.log_scale.grad.isfinite()
    assert loss.log_scale.item() == pytest.approx(math.log(100))


def test_a_fixed_temperature_is_no_parameter_and_not_saved() -> None:
    assert not list(InfoNCE().parameters())
    assert not InfoNCE().state_dict()


def test_a_single_pair_and_none_at_all() -> None:
    one, none = gaussian(1, 4).requires_grad_(), torch.zeros(0, 4, requires_grad=True)
    for loss in (*(kind() for kind in TEMPERED), HardNegativeNCE(tau=0.1), MarginTriplet(), SigLIP()):
        for x in (one, none):
            value = loss(x, x)["loss"]
            assert value.isfinite()
            assert torch.autograd.grad(value, x)[0].isfinite().all()
    assert InfoNCE()(one, one)["loss"].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfoNCE(0.001), r"temperature is 0.001; expected a finite number of at least 0.01: .* overflows"),
        (lambda: InfoNCE(math.nan), "temperature is nan; expected a finite number"),
        (lambda: InfoNCE(max_scale=0.5), r"max_scale is 0.5; expected a number in \[1, 10000\]"),
        (lambda: FocalNCE(gamma=-1.0), "gamma is -1.0; expected at least 0"),
        (lambda: HardNegativeNCE(tau=1.0), r"tau is 1.0; expected a number in \[0, 1\)"),
        (lambda: MarginTriplet(3.0), r"margin is 3.0; expected a number in \[0, 2\]"),
        (lambda: SigLIP(0.0), "temperature is 0.0; expected a finite number of at least 0.01"),
        (lambda: SigLIP(bias=math.inf), "bias is inf; expected a finite number"),
        (lambda: HardNegativeNCE(beta=-1.0), "beta is -1.0; expected at least 0"),
        (lambda: PairMultiTask(label_smoothing=1.0), r"label_smoothing is 1.0; expected a number in \[0, 1\)"),
        (lambda: PairMultiTask(weight=-1.0), "weight is -1.0; expected at least 0"),
        (
            lambda: InfoNCE()(torch.zeros(2, 3), torch.zeros(3, 3)),
            r"image is \(2, 3\), text \(3, 3\), labels none; expected",
        ),
        (
            lambda: PairMultiTask()(*[torch.zeros(2, 3)] * 2, None, torch.zeros(2, 5), torch.zeros(2, 2)),
            r"logits are \(2, 5\) and classes \(2, 2\) of 2 pairs; expected \(2, 2, k\) and \(2, 2\)",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
