"""Pairs of images side by side, and the captions that name the classes left and right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vitkit.data import ImageSplit, Preprocessing
from vitkit.distributed import world_size
from vitkit.errors import UsageError
from vitkit.seeding import derive_seed
from vitkit.transforms import Mixing, Transform
from vitkit.validation import at_least, in_range, one_of

CAPTION = "the photo on the left is {} and the photo on the right is {}"
FIXED = 10_000
"""Pairs of an evaluation."""


def captions(classes: Sequence[str]) -> list[str]:
    """All k² captions of k classes, the one of (left, right) at left·k + right; underscores in names become spaces.

    Raises `UsageError` if there are fewer than two classes, or if two classes would have the same caption.
    """
    _check_classes(len(classes))
    names = [name.replace("_", " ") for name in classes]
    same = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if same is not None:
        one, other = classes[names.index(names[same])], classes[same]
        raise UsageError(f"the classes {one!r} and {other!r} have the same captions ({names[same]!r}); rename one of them")
    return [CAPTION.format(left, right) for left in names for right in names]


@dataclass(frozen=True)
class Pairs:
    """Pairs from a labelled split of k `classes`, in batches of `batch_size` per rank: `contracts.Batches`.

    A batch is `images` float32 `(b c h 2w)`, two images side by side, normalised; `left` and `right` int64 `(b,)`, their
    classes; and `labels` int64 `(b,)`, left·k + right, the number of the caption. In an epoch every image of the split is
    on the left once. With probability `different`, the right image has another class: the class is drawn with equal
    probabilities, then one of its images. In the other cases the right image is another image of the same class. The pairs
    of an epoch are drawn from (seed, epoch), the augmentation of a batch from (seed, epoch, index, rank), so that an epoch
    can start at any batch.

    Lazily read images (`contracts.LazyImages`) are on the left in the order of their storage. The class on the right is
    drawn in the same way. Then one of its images is drawn that is at most `locality` positions (or one batch, if that is
    more) from the left image in this order. If there is none, any image of the class is drawn. A pair with an image that
    cannot be read is left out, and `skipped` names the image.

    `augment` gets halves `(2b c h w)` and draws parameters for each; With `augment_pair="stacked"` it gets pairs `(b c h
    2w)`. A flip then exchanges left and right and makes the caption wrong; this is for comparison only. `mixing` mixes
    augmented halves of one class (`same_class=True`: no caption describes a mixture of two).

    W ranks share each W · `batch_size` pairs. With `drop_last` the last, incomplete batch is left out. Without it, the
    sizes of the ranks' last batches differ by up to one. Raises `UsageError` if an image has no label, `classes` or the
    split have fewer than two classes, a label is not a class, `different` is outside [0, 1], `mixing` mixes different
    classes, or `batch_size` is below 1.
    """

    split: ImageSplit
    classes: Sequence[str]
    batch_size: int
    different: float = 0.5
    augment: Transform | None = None
    augment_pair: Literal["half", "stacked"] = "half"
    mixing: Mixing | None = None
    drop_last: bool = False
    frozen: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_classes(len(self.classes))
        at_least(1, batch_size=self.batch_size)
        in_range(0, 1, different=self.different)
        one_of(("half", "stacked"), augment_pair=self.augment_pair)
        if self.mixing is not None and not self.mixing.same_class:
            raise UsageError(
                f"{self.mixing} mixes halves of two classes, which no caption describes; give same_class=True"
            )
        labels = self.split.labels
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
            raise UsageError(
                f"pairs need labelled images: expected at least one, and labels from 0 to {len(self.classes) - 1}, none of "
                f"them -1 (no label)"
            )
        if int(labels.min()) == int(labels.max()):
            raise UsageError(
                f"every image of this split is {self.classes[int(labels[0])]!r}; pairs need images of at least two classes"
            )

    def __len__(self) -> int:
        """The number of batches per epoch, equal on every rank."""
        return self._count(world_size())

    @property
    def skipped(self) -> list[str]:
        """One line per image that could not be read so far."""
        return self.split.skipped

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of a model that is trained on these pairs: pairs `(c h 2w)`, normalised in the same way."""
        channels, height, width = self.split.preprocessing.shape
        return replace(self.split.preprocessing, shape=(channels, height, 2 * width))

    def fixed(self, seed: int = 0, count: int = FIXED) -> "Pairs":
        """`count` pairs for an evaluation, drawn only by `seed`: the same in every epoch, in one order, not augmented.

        Each image is on the left equally often, up to a difference of one. Lazily read images are read into memory. Raises
        `UsageError` if the count is below 1.
        """
        at_least(1, count=count)
        split = self.split.in_memory()
        return replace(self, split=split, augment=None, mixing=None, drop_last=False, frozen=(seed, count))

    def drawn(self, number: int = 0, *, seed: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """The indices `(n,)` of an epoch's left and right images in the split, in order."""
        if self.frozen is not None:
            number, (seed, count) = 0, self.frozen
        else:
            count = len(self.split)
        generator = torch.Generator().manual_seed(derive_seed(seed, number))
        rounds, size = -(-count // len(self.split)), self.batch_size * world
        left = torch.cat([self.split.order(generator, size) for _ in range(rounds)])[:count]
        return left, self._partners(left, max(self.split.locality, size), generator)

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch from index `start` on, on `device`."""
        drawn = torch.stack(self.drawn(number, seed=seed, world=world), dim=1)  # (n 2)
        size, indices = self.batch_size * world, range(start, self._count(world))
        pairs = [drawn[index * size : (index + 1) * size].tensor_split(world)[rank] for index in indices]
        # Each image once, and sorted: a memory-mapped file is read in one direction.
        read = self.split.read(pair.unique() for pair in pairs)
        for index, pair, (images, rows) in zip(indices, pairs, read, strict=True):
            yield self._make(pair, images, rows, derive_seed(seed, number, index, rank), torch.device(device))

    def _count(self, world: int) -> int:
        pairs = len(self.split) if self.frozen is None else self.frozen[1]
        full, rest = divmod(pairs, self.batch_size * world)
        return full + (rest > 0 and not self.drop_last)

    def _make(self, pair: Tensor, images: Tensor, rows: Tensor, seed: int, device: torch.device) -> dict[str, Tensor]:
        """A batch of the pairs `(b 2)` whose two images are among the sorted `rows`."""
        pair = pair[torch.isin(pair, rows).all(1)]
        split, flat = self.split, pair.flatten()  # (b 2) → left, right, left, right, …
        halves = split.preprocessing.pixels(images.index_select(0, torch.searchsorted(rows, flat)).to(device))  # (2b c h w)
        generator = torch.Generator(halves.device).manual_seed(seed)
        if self.augment is not None and self.augment_pair == "half":
            halves = self.augment(halves, generator)
        if self.mixing is not None:
            halves = self.mixing(halves, split.labels[flat].to(device), generator)[0]
        images = torch.cat(halves.unflatten(0, (-1, 2)).unbind(1), dim=-1)  # (b c h 2w)
        if self.augment is not None and self.augment_pair == "stacked":
            images = self.augment(images, generator)
        left, right = split.labels[pair].to(device).unbind(1)
        return {
            "images": split.preprocessing.normalise(images), "left": left, "right": right,
            "labels": left * len(self.classes) + right,
        }  # fmt: skip

    def _partners(self, left: Tensor, reach: int, generator: torch.Generator) -> Tensor:
        """For each left image the index of the right image, which is read within `reach` places of the left one."""
        labels, n = self.split.labels, len(self.split)
        place = torch.arange(n)
        if reach < n:  # else all images are equally near, and `left` may not hold each of them once
            place[left] = torch.arange(n)
        keys = labels * n + place
        order = keys.argsort()  # by class, and within a class by place
        counts = torch.bincount(labels, minlength=len(self.classes))
        starts = counts.cumsum(0) - counts
        present = counts.nonzero().squeeze(1)  # classes that have images
        left_labels = labels[left]
        which = torch.searchsorted(present, left_labels)
        step = torch.randint(1, len(present), left_labels.shape, generator=generator)
        other = torch.rand(left_labels.shape, generator=generator) < self.different
        chosen = torch.where(other, present[(which + step) % len(present)], left_labels)
        # Images of a class within reach are adjacent in `order`. Of the left image's class, all but that image count.
        first = torch.searchsorted(keys[order], chosen * n + (place[left] - reach).clamp(min=0))
        last = torch.searchsorted(keys[order], chosen * n + (place[left] + reach).clamp(max=n - 1), right=True)
        among = last - first - (~other).long()
        first = torch.where(among > 0, first, starts[chosen])
        among = torch.where(among > 0, among, counts[chosen] - (~other).long()).clamp(min=1)
        drawn = (torch.rand(left_labels.shape, generator=generator, dtype=torch.float64) * among).long().minimum(among - 1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(n)
        skipped = ~other & (counts[left_labels] > 1) & (drawn >= inverse[left] - first)
        return order[first + drawn + skipped.long()]


def _check_classes(count: int) -> None:
    if count < 2:
        raise UsageError(f"pairs and their captions need a dataset of at least two classes; given {count}")


__all__ = ["CAPTION", "Pairs", "captions"]
