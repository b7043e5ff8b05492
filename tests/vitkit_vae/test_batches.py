from dataclasses import replace
from typing import Any

import pytest
import torch
from lazy_images import Lazy
from torch import Tensor

from vitkit.data import ImageSplit, Preprocessing
from vitkit.errors import UsageError
from vitkit.transforms import Compose, Noise
from vitkit_vae import TripletBatches

LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 3, 2])


def split(labels: Tensor = LABELS) -> ImageSplit:
    """An image tells its number by its brightness."""
    pixels = (torch.arange(len(labels)) * 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return ImageSplit(pixels, labels, Preprocessing((1, 2, 2), (0.0,), (1.0,)))


def numbers(images: Tensor) -> Tensor:
    return (images[:, 0, 0, 0] * 25.5).round().long()


def drawn(batches: TripletBatches, epochs: int = 1, **kwargs: Any) -> list[Tensor]:
    """Numbers and labels `(4, n)` of every batch."""
    return [
        torch.stack([*(numbers(batch[name]) for name in ("images", "positives", "negatives")), batch["labels"]])
        for epoch in range(epochs)
        for batch in batches.epoch(epoch, **kwargs)
    ]


def test_positives_are_others_of_the_class_and_negatives_of_other_classes() -> None:
    seen = torch.cat(drawn(TripletBatches(split(), 4), epochs=200), dim=1)
    anchors, positives, negatives, labels = seen
    assert torch.equal(LABELS[anchors], labels)
    assert torch.equal(LABELS[positives], labels)
    assert (LABELS[negatives] != labels).all()
    assert torch.equal(positives == anchors, labels == 3)  # alone in its class
    for anchor, label in enumerate(LABELS.tolist()):
        mine = anchors == anchor
        assert int(mine.sum()) == 200  # once an epoch
        assert set(positives[mine].tolist()) == (set((label == LABELS).nonzero()[:, 0].tolist()) - {anchor} or {anchor})
        assert set(negatives[mine].tolist()) == set((label != LABELS).nonzero()[:, 0].tolist())


def test_augmented_positives_are_the_anchor_in_another_view() -> None:
    batches = TripletBatches(split(), 4, augment=Compose([Noise(0.01)]), positives="augmented")
    batch = next(batches.epoch(0))
    assert torch.equal(numbers(batch["images"]), numbers(batch["positives"]))
    assert not torch.equal(batch["images"], batch["positives"])


def test_an_epoch_can_be_entered_anywhere_and_is_shared_by_ranks() -> None:
    batches = TripletBatches(split(), 3)
    whole = drawn(batches, seed=5)
    assert len(whole) == len(batches) == 4
    assert all(map(torch.equal, drawn(batches, seed=5, start=2), whole[2:]))
    assert not all(map(torch.equal, drawn(batches, seed=6), whole))
    ranks = [torch.cat([part[0] for part in drawn(batches, rank=rank, world=2)]) for rank in range(2)]
    assert torch.cat(ranks).sort().values.tolist() == list(range(12))


def test_lazily_read_images_give_the_same_triplets_without_those_of_an_unreadable_image() -> None:
    whole, lazy = TripletBatches(split(), 3), TripletBatches(replace(split(), images=Lazy(split().images, broken=[7])), 3)
    expected = [batch[:, (batch[:3] != 7).all(0)] for batch in drawn(whole, seed=5)]
    found = drawn(lazy, seed=5)
    assert all(map(torch.equal, found, expected))
    assert sum(batch.shape[1] for batch in found) < 12
    assert lazy.skipped == ["row 7"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TripletBatches(split(), 0), "batch_size is 0; expected at least 1"),
        (lambda: TripletBatches(split(), 2, positives="same"), "positives is 'same'; expected 'class', 'augmented'"),
        (lambda: TripletBatches(split(torch.zeros(4, dtype=torch.int64)), 2), "labels of all images, of two classes at least"),
        (lambda: TripletBatches(split(torch.tensor([0, -1])), 2), "labels of all images, of two classes at least"),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
