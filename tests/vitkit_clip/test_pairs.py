"""Pairs: what a batch holds, how partners are drawn, augmentation of halves, ranks, entering anywhere."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from lazy_images import Lazy
from torch import Tensor

from vitkit import Run
from vitkit.contracts import Batches
from vitkit.data import ImageSplit, Preprocessing
from vitkit.errors import UsageError
from vitkit.transforms import HorizontalFlip, MixUp
from vitkit_clip import Pairs, captions

CLASSES = ["ant", "sea_lion", "cat"]
COUNTS = (40, 25, 7)


@pytest.fixture
def split() -> ImageSplit:
    """Images `(1 4 4)` whose upper left pixel is their own number and whose others are their class, times fifty."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(COUNTS)])
    images = (labels * 50).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 4, 4)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return ImageSplit(images, labels, Preprocessing((1, 4, 4), (0.0,), (1.0,)))


def pixels(batch: dict[str, Tensor]) -> Tensor:
    return (batch["images"] * 255).round().long()


def test_captions_are_ordered_by_left_then_right() -> None:
    said = captions(CLASSES)
    assert len(said) == 9
    assert said[0 * 3 + 1] == "the photo on the left is ant and the photo on the right is sea lion"
    assert said[1 * 3 + 2] == "the photo on the left is sea lion and the photo on the right is cat"


@pytest.mark.parametrize("classes", [["sea_lion", "ant", "sea lion"], ["ant", "cat", "ant"]])
def test_classes_that_no_caption_tells_apart_are_refused(classes: list[str]) -> None:
    message = f"the classes {classes[0]!r} and {classes[2]!r} have the same captions .* rename one of them"
    with pytest.raises(UsageError, match=message):
        captions(classes)


def test_a_batch_is_two_images_side_by_side_and_what_they_show(split: ImageSplit) -> None:
    pairs = Pairs(split, CLASSES, 16)
    assert isinstance(pairs, Batches)
    batches = list(pairs.epoch(0, seed=3))
    assert len(batches) == len(pairs) == 5
    for batch in batches:
        seen = pixels(batch)
        assert seen.shape[1:] == (1, 4, 8)
        assert torch.equal(seen[:, 0, 3, 0], batch["left"] * 50)
        assert torch.equal(seen[:, 0, 3, 4], batch["right"] * 50)
        assert torch.equal(batch["labels"], batch["left"] * 3 + batch["right"])
    numbers = torch.cat([pixels(batch)[:, 0, 0, 0] for batch in batches])
    assert numbers.sort().values.tolist() == list(range(sum(COUNTS)))  # every image stands on the left once


def test_the_other_image_is_of_another_class_as_often_as_asked(split: ImageSplit) -> None:
    drawn = [Pairs(split, CLASSES, 16).drawn(number) for number in range(100)]
    left, right = (torch.cat(side) for side in zip(*drawn, strict=True))
    labels = split.labels
    assert (labels[left] != labels[right]).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (left != right).all()  # never the image itself
    other = labels[right][(labels[left] == 0) & (labels[right] != 0)]
    assert (other == 1).float().mean().item() == pytest.approx(
        0.5, abs=0.03
    )  # classes are drawn evenly, whatever their size
    for share in (0.0, 1.0):
        left, right = Pairs(split, CLASSES, 16, different=share).drawn()
        assert bool(((labels[left] != labels[right]) == bool(share)).all())


def test_within_a_class_every_other_image_is_as_likely(split: ImageSplit) -> None:
    pairs = Pairs(split, CLASSES, 16, different=0.0)
    drawn = [pairs.drawn(number) for number in range(400)]
    left, right = (torch.cat(side) for side in zip(*drawn, strict=True))
    last = list(range(65, 72))  # the seven of class 2
    counts = torch.bincount(right[left == 67], minlength=72)
    assert counts[67] == 0
    assert counts[:65].sum() == 0
    assert min(counts[i] for i in last if i != 67) > 40  # 67 on average


def test_a_class_with_one_image_stands_beside_itself(split: ImageSplit) -> None:
    few = split.subset(torch.tensor([0, 1, 70]))
    left, right = Pairs(few, CLASSES, 2, different=0.0).drawn()
    assert dict(zip(left.tolist(), right.tolist(), strict=True)) == {0: 1, 1: 0, 2: 2}


def test_classes_without_images_are_never_drawn(split: ImageSplit) -> None:
    few = split.subset((split.labels != 1).nonzero().squeeze(1))
    _, right = Pairs(few, CLASSES, 4, different=1.0).drawn()
    assert set(few.labels[right].tolist()) == {0, 2}


def test_pairs_follow_seed_and_epoch_and_are_entered_anywhere(split: ImageSplit) -> None:
    pairs = Pairs(split, CLASSES, 16, augment=HorizontalFlip())
    whole = list(pairs.epoch(4, seed=1))
    later = list(pairs.epoch(4, seed=1, start=3))
    assert len(later) == 2
    for one, other in zip(whole[3:], later, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(next(pairs.epoch(5, seed=1))["images"], whole[0]["images"])
    assert not torch.equal(next(pairs.epoch(4, seed=2))["images"], whole[0]["images"])


def test_ranks_share_an_epoch(split: ImageSplit) -> None:
    pairs = Pairs(split, CLASSES, 10)
    whole = torch.cat([pixels(batch)[:, 0, 0, 0] for batch in Pairs(split, CLASSES, 20).epoch(0)])
    ranks = [[pixels(b)[:, 0, 0, 0] for b in pairs.epoch(0, rank=rank, world=2)] for rank in range(2)]
    assert torch.equal(torch.cat([part for both in zip(*ranks, strict=True) for part in both]), whole)
    assert len(list(replace(pairs, drop_last=True).epoch(0, world=2))) == 3


def test_fixed_pairs_are_the_same_in_every_epoch_and_not_augmented(split: ImageSplit) -> None:
    pairs = Pairs(split, CLASSES, 50, augment=HorizontalFlip(1.0), drop_last=True)
    fixed = pairs.fixed(7, count=150)
    assert len(fixed) == 3
    one, other = list(fixed.epoch(0)), list(fixed.epoch(9, seed=5))
    assert torch.equal(torch.cat([b["images"] for b in one]), torch.cat([b["images"] for b in other]))
    numbers = torch.cat([pixels(batch)[:, 0, 0, 0] for batch in one])
    assert torch.bincount(numbers, minlength=72).unique().tolist() == [2, 3]
    assert not torch.equal(pairs.fixed(8, count=150).drawn()[1], fixed.drawn()[1])
    assert pairs.fixed().drawn()[0].shape == (10_000,)


def test_each_half_is_augmented_on_its_own_and_stays_where_it_is(split: ImageSplit) -> None:
    plain = next(Pairs(split, CLASSES, 72).epoch(0))["images"]
    half = next(Pairs(split, CLASSES, 72, augment=HorizontalFlip(1.0)).epoch(0))["images"]
    torch.testing.assert_close(half.unflatten(3, (2, 4)), plain.unflatten(3, (2, 4)).flip(4))
    stacked = next(Pairs(split, CLASSES, 72, augment=HorizontalFlip(1.0), augment_pair="stacked").epoch(0))["images"]
    torch.testing.assert_close(stacked, plain.flip(3))  # left and right have changed places, the caption has not
    some = next(Pairs(split, CLASSES, 72, augment=HorizontalFlip(0.5)).epoch(0))["images"]
    moved = (some != plain).unflatten(3, (2, 4)).any(4).any(2).any(1)  # (b 2)
    assert {tuple(row) for row in moved.tolist()} == {(a, b) for a in (True, False) for b in (True, False)}


def test_mixing_stays_within_a_class(split: ImageSplit) -> None:
    batch = next(Pairs(split, CLASSES, 72, mixing=MixUp(same_class=True)).epoch(0))
    seen = pixels(batch)
    assert torch.equal(seen[:, 0, 3, 0], batch["left"] * 50)
    assert torch.equal(seen[:, 0, 3, 4], batch["right"] * 50)
    plain = pixels(next(Pairs(split, CLASSES, 72).epoch(0)))
    assert (seen != plain).any(3).any(2).any(1).float().mean() > 0.5


def test_run_fit_records_how_pairs_are_prepared(split: ImageSplit, tmp_path: Any) -> None:
    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": (self.weight * batch["images"]).mean()}

    run, model = Run(tmp_path / "run", device="cpu"), Mean()
    pairs = Pairs(split, CLASSES, 32)
    for _ in run.fit(model, pairs, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)):
        pass
    assert run._preprocessing == {"shape": [1, 4, 8], "mean": [0.0], "std": [1.0], "fit": "resize"}
    run.close()


def lazily(split: ImageSplit, **options: Any) -> ImageSplit:
    return replace(split, images=Lazy(split.images, **options))


def test_images_that_are_read_lazily_make_the_pairs_of_a_tensor(split: ImageSplit) -> None:
    for options in ({}, {"rank": 1, "world": 2, "start": 1}):
        one, other = (list(Pairs(some, CLASSES, 16).epoch(2, seed=5, **options)) for some in (split, lazily(split)))
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_partners_of_lazy_images_are_near_in_the_order_of_reading(split: ImageSplit) -> None:
    locality, labels = 12, split.labels
    near = far = 0
    for number in range(60):
        left, right = Pairs(lazily(split, locality=locality), CLASSES, 4).drawn(number)
        assert left.sort().values.tolist() == list(range(len(labels)))
        assert (left != right).all()
        # The classes are those of images in memory, whose order is the same.
        assert torch.equal(labels[right], labels[Pairs(split, CLASSES, 4).drawn(number)[1]])
        place = left.argsort()
        for one, partner in zip(left.tolist(), right.tolist(), strict=True):
            around = left[max(place[one] - locality, 0) : place[one] + locality + 1]
            fitting = set(around[labels[around] == labels[partner]].tolist()) - {one}
            assert partner in fitting or not fitting
            near, far = near + bool(fitting), far + (not fitting)
    assert far > 20  # the smallest class is often out of reach; then one of all its images
    assert near > 10 * far


def test_within_reach_every_image_of_a_class_is_as_likely(split: ImageSplit) -> None:
    apart: Counter[int] = Counter()
    for number in range(700):
        left, right = Pairs(lazily(split, locality=20), CLASSES, 4).drawn(number)
        chosen = (split.labels[left] == 0) & (split.labels[right] == 1)
        chosen[:20] = chosen[52:] = False  # twenty places to either side
        apart.update((left.argsort()[right] - torch.arange(72))[chosen].tolist())
    assert sorted(apart) == [places for places in range(-20, 21) if places]
    assert apart.total() > 40 * 60
    assert max(apart.values()) < 2 * min(apart.values())


def test_a_batch_is_within_reach_of_itself_for_any_number_of_ranks(split: ImageSplit) -> None:
    pairs, whole = Pairs(lazily(split, locality=0), CLASSES, 12), Pairs(lazily(split, locality=0), CLASSES, 24)
    left, right = pairs.drawn(3, world=2)
    place = left.argsort()
    assert ((place[right] - torch.arange(len(left))).abs() <= 24).float().mean() > 0.9
    for one, other in zip((left, right), whole.drawn(3), strict=True):
        assert torch.equal(one, other)
    ranks = [list(pairs.epoch(3, rank=rank, world=2)) for rank in range(2)]
    for index, batch in enumerate(whole.epoch(3)):
        for name in ("images", "left", "right", "labels"):
            assert torch.equal(torch.cat([rank[index][name] for rank in ranks]), batch[name])


def test_a_pair_with_an_image_that_cannot_be_read_is_left_out(split: ImageSplit) -> None:
    broken = {3, 50, 71}
    pairs = Pairs(lazily(split, broken=broken), CLASSES, 16)
    left, right = (side.tolist() for side in pairs.drawn(1))
    batches = list(pairs.epoch(1))
    kept = [(a, b) for a, b in zip(left, right, strict=True) if not {a, b} & broken]
    assert len(kept) < len(left) - len(broken)  # on the right, too
    seen = [tuple(row) for batch in batches for row in pixels(batch)[:, 0, 0, [0, 4]].tolist()]
    assert seen == kept
    assert all(torch.equal(pixels(batch)[:, 0, 3, 4], batch["right"] * 50) for batch in batches)
    assert sorted(pairs.skipped) == ["row 3", "row 50", "row 71"]


def test_each_image_of_a_batch_is_read_once(split: ImageSplit) -> None:
    asked: list[Tensor] = []

    class Watched(Lazy):
        def read(self, shares: Any) -> Any:
            asked.extend(shares := list(shares))
            return super().read(shares)

    pairs = Pairs(replace(split, images=Watched(split.images)), CLASSES, 30)
    left, right = pairs.drawn()
    list(pairs.epoch(0))
    for share, start in zip(asked, (0, 30, 60), strict=True):
        both = torch.cat([left[start : start + 30], right[start : start + 30]])
        assert torch.equal(share, both.unique())


def test_fixed_pairs_of_lazy_images_are_of_those_that_can_be_read(split: ImageSplit) -> None:
    fixed = Pairs(lazily(split, broken=[3, 50]), CLASSES, 50).fixed(7, count=150)
    whole = split.subset(torch.tensor([n for n in range(72) if n not in (3, 50)]))
    for one, other in zip(fixed.epoch(0), Pairs(whole, CLASSES, 50).fixed(7, count=150).epoch(0), strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["ant"]}, "a dataset of at least two classes; given 1"),
        ({"classes": CLASSES[:2]}, r"labels from 0 to 1, none of them -1 \(no label\)"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"different": 1.5}, r"different is 1.5; expected a number in \[0, 1\]"),
        ({"augment_pair": "both"}, "augment_pair is 'both'; expected 'half', 'stacked'"),
        ({"mixing": MixUp()}, "mixes halves of two classes, which no caption describes; give same_class=True"),
    ],
)
def test_wrong_arguments_say_what_was_expected(split: ImageSplit, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(Pairs(split, CLASSES, 4), **change)


def test_one_class_and_hidden_labels_are_refused(split: ImageSplit) -> None:
    with pytest.raises(
        UsageError, match="every image of this split is 'ant'; pairs need images of at least two classes"
    ):
        Pairs(split.subset(torch.arange(10)), CLASSES, 4)
    with pytest.raises(UsageError, match="none of them -1"):
        Pairs(split.mask_labels(0.5), CLASSES, 4)
    with pytest.raises(UsageError, match="at least two classes; given 1"):
        captions(["ant"])
    with pytest.raises(UsageError, match="count is 0; expected at least 1"):
        Pairs(split, CLASSES, 4).fixed(count=0)
