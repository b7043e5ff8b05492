from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor

from vitkit.errors import UsageError
from vitkit_vae import TripletLoss


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 3])


def test_distances_on_a_line_give_the_loss_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    labels = torch.tensor([0, 0, 1, 1])
    loss = TripletLoss(2.5, "batch_hard", normalize=False)
    # d(a, p) − d(a, n) + 2.5, hardest of each: 1 − 3, 1 − 2, 0.5 − 2, 0.5 − 2.5
    expected = torch.tensor([0.5, 1.5, 1.0, 0.5])
    found = loss(x, labels)
    torch.testing.assert_close(found["loss"], expected.mean())
    assert found["active"] == 1.0
    given = loss(x[:1], positives=x[1:2], negatives=x[3:])
    torch.testing.assert_close(given["loss"], torch.tensor(1 - 3.5 + 2.5))


@pytest.mark.parametrize("mining", ["random", "batch_hard", "semi_hard", "given"])
def test_the_uninformed_value_is_that_of_embeddings_that_differ_by_noise_alone(mining: Any) -> None:
    x = 1 + 1e-4 * drawn(60, 8)
    loss = TripletLoss(0.3) if mining == "given" else TripletLoss(0.3, mining)
    found = loss(x, positives=x.flip(0), negatives=x.roll(1, 0)) if mining == "given" else loss(x, torch.arange(60) % 3)
    assert loss.uninformed(60)["loss"] == pytest.approx(float(found["loss"]), rel=1e-2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard", "given"])
def test_pytorch_metric_learning_gives_the_same_loss_and_gradient(mining: str, margin: float, normalize: bool) -> None:
    distance = LpDistance(normalize_embeddings=normalize)
    reference = TripletMarginLoss(margin=margin, distance=distance, reducer=MeanReducer())
    x, y = (drawn(10, 5).requires_grad_() for _ in range(2))
    if mining == "given":
        anchors, p, n = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([1, 2, 0])
        found = TripletLoss(margin, normalize=normalize)(x[anchors], positives=x[p], negatives=x[n])
        triplets = anchors, p, n
    else:
        found = TripletLoss(margin, mining, normalize)(x, LABELS)
        if mining == "batch_hard":
            triplets = BatchHardMiner(distance=distance)(y.detach(), LABELS)
        else:
            triplets = nearest(y.detach(), TripletMarginMiner(margin, "semihard", distance=distance)(y.detach(), LABELS), distance)
    expected = reference(y, LABELS, triplets)
    torch.testing.assert_close(found["loss"], expected, atol=1e-6, rtol=1e-5)
    found["loss"].backward()
    expected.backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-4)


def nearest(x: Tensor, triplets: tuple[Tensor, Tensor, Tensor], distance: Any) -> tuple[Tensor, ...]:
    """Of all semi-hard triplets of an anchor and a positive the one with the nearest negative."""
    far, best = distance(x), {}
    for a, p, n in zip(*(one.tolist() for one in triplets), strict=True):
        if (a, p) not in best or far[a, n] < far[a, best[a, p]]:
            best[a, p] = n
    return tuple(torch.tensor(column) for column in zip(*((a, p, n) for (a, p), n in best.items()), strict=True))


def test_random_mining_draws_every_triplet_and_nothing_else() -> None:
    loss = TripletLoss(margin=0.0, mining="random", normalize=False)
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [20.0]])
    labels = torch.tensor([0, 0, 0, 1, 2])  # two classes have one member: no anchors
    torch.manual_seed(0)
    assert {float(loss(x, labels)["loss"]) for _ in range(50)} == {0.0}
    near = torch.tensor([[0.0], [10.0], [20.0], [1.0], [2.0]])
    means = torch.stack([loss(near, labels)["loss"] for _ in range(2000)]).mean()
    pairs = [(a, p, n) for a in range(3) for p in range(3) if p != a for n in (3, 4)]
    expected = sum(max(0.0, abs(near[a] - near[p]).item() - abs(near[a] - near[n]).item()) for a, p, n in pairs) / len(pairs)
    assert float(means) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("mining", ["random", "batch_hard", "semi_hard"])
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [-1, -1, -1, -1], [0, 0, -1, -1]])
def test_a_batch_without_a_triplet_has_no_loss_and_no_gradient(mining: Any, labels: list[int]) -> None:
    x = drawn(4, 3).requires_grad_()
    found = TripletLoss(mining=mining)(x, torch.tensor(labels))
    found["loss"].backward()
    assert found["loss"] == 0
    assert found["active"] == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("mining", ["random", "batch_hard", "semi_hard"])
def test_equal_and_huge_embeddings_stay_finite(mining: Any) -> None:
    for x in (torch.zeros(10, 3), torch.ones(10, 3), 1e15 * drawn(10, 3)):
        x.requires_grad_()
        found = TripletLoss(mining=mining)(x, LABELS)
        found["loss"].backward()
        assert found["loss"].isfinite()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_the_margin_s_limits() -> None:
    apart = torch.nn.functional.one_hot(LABELS).float()  # classes are √2 apart
    assert TripletLoss(1.4, "batch_hard")(apart, LABELS)["loss"] == 0
    together = torch.ones(10, 3)
    torch.testing.assert_close(TripletLoss(0.7, "batch_hard")(together, LABELS)["loss"], torch.tensor(0.7))
    hidden = LABELS.clone()
    hidden[::2] = -1  # as if they were not there
    x = drawn(10, 4)
    torch.testing.assert_close(TripletLoss()(x, hidden), TripletLoss()(x[1::2], LABELS[1::2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TripletLoss(mining="hard"), r"mining is 'hard'; did you mean 'semi_hard'\? expected 'random', 'batch_hard', "),
        (lambda: TripletLoss(-1.0), "margin is -1.0; expected at least 0"),
        (lambda: TripletLoss()(torch.zeros(4, 2)), r"embeddings are \(4, 2\) and labels None; expected \(batch, dim\) and"),
        (lambda: TripletLoss(mining="given")(drawn(10, 2), LABELS), "mining is 'given', .* which mining='given' needs"),
        (lambda: TripletLoss()(torch.zeros(4, 2), torch.zeros(3)), r"are \(4, 2\) and labels \(3,\); expected"),
        (
            lambda: TripletLoss()(torch.zeros(4, 2), positives=torch.zeros(4, 2), negatives=torch.zeros(3, 2)),
            r"anchors, positives and negatives are \[\(3, 2\), \(4, 2\)\]; expected one shape",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
