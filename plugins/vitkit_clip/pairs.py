"""Pairs of images side by side, and the captions that say what stands left and right."""

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

CAPTION = "the photo on the left is {} and the photo on the right is {}"
FIXED = 10_000


def captions(classes: Sequence[str]) -> list[str]:
    """All k² captions of k classes, the one of (left, right) at left·k + right; underscores in names become spaces.

    Raises `UsageError` for fewer than two classes, and for two whose captions would be the same.
    """
    _check_classes(len(classes))
    names = [name.replace("_", " ") for name in classes]
    same = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if same is not None:
        one, other = classes[names.index(names[same])], classes[same]
        raise UsageError(f"the classes {one!r} and {other!r} have the same captions ({names[same]!r}); give each a name of its own")
    return [CAPTION.format(left, right) for left in names for right in names]


@dataclass(frozen=True)
class Pairs:
    """Pairs from a labelled split of k `classes`, in batches of `batch_size` a rank: `contracts.Batches`.

    A batch is `images` float32 `(b c h 2w)`, two images side by side, normalised; `left` and `right` int64 `(b,)`, their
    classes; and `labels` int64 `(b,)`, left·k + right, the number of the caption. In an epoch every image of the split
    stands on the left once; on the right stands one of another class with probability `different`, else another one of the
    same class: a class is drawn evenly, then one of its images. Pairs are drawn anew each epoch from (seed, epoch), the
    augmentation of a batch from (seed, epoch, index, rank), so an epoch can be entered anywhere.

    Of lazily read images (`contracts.LazyImages`) those on the left come in the order that suits what they lie in. The class
    on the right is drawn in the same way, then one of its images among those within `reach` places of the left one in that
    order, or within a batch where that is more; where it has none there, one of all. A pair with an image that cannot be
    read is left out, and the image named in `skipped`.

    `augment` sees halves `(2b c h w)`, each with parameters of its own; with `augment_pair="stacked"` it sees pairs
    `(b c h 2w)`, where a flip exchanges left and right and makes the caption wrong: for comparison alone. `mixing` mixes
    augmented halves of one class (`same_class=True`: of two classes, no caption would be true).

    W ranks share each run of W · `batch_size` pairs; the rest is left out with `drop_last`, and without it the ranks' last
    batches differ by up to one. Raises `UsageError` for hidden labels, fewer than two classes (in the split, too), labels
    beyond them, `different` outside [0, 1], a `mixing` across classes and a `batch_size` below 1.
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
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; expected at least 1 pair")
        if not 0.0 <= self.different <= 1.0:
            raise UsageError(f"different is {self.different}; expected a probability in [0, 1]")
        if self.augment_pair not in ("half", "stacked"):
            raise UsageError(f"augment_pair is {self.augment_pair!r}; expected 'half' or 'stacked'")
        if self.mixing is not None and not self.mixing.same_class:
            raise UsageError(
                f"{self.mixing} mixes halves of two classes, which no caption describes; give same_class=True"
            )
        labels = self.split.labels
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
            raise UsageError(
                f"pairs need labelled images: expected at least one, and labels from 0 to {len(self.classes) - 1}, none "
                f"hidden (-1)"
            )
        if int(labels.min()) == int(labels.max()):
            raise UsageError(
                f"every image of this split is {self.classes[int(labels[0])]!r}; pairs need images of at least two classes"
            )

    def __len__(self) -> int:
        """Batches an epoch, the same number on every rank."""
        return self._count(world_size())

    @property
    def skipped(self) -> list[str]:
        """A line for each image that could not be read so far."""
        return self.split.skipped

    @property
    def preprocessing(self) -> Preprocessing:
        """What a model that is trained on these pairs must be given: pairs `(c h 2w)`, normalised as here."""
        channels, height, width = self.split.preprocessing.shape
        return replace(self.split.preprocessing, shape=(channels, height, 2 * width))

    def fixed(self, seed: int = 0, count: int = FIXED) -> "Pairs":
        """`count` pairs drawn by `seed` alone, the same in every epoch, in one order, not augmented: to evaluate on.

        Every image stands on the left as often as any other, give or take one. Lazily read images are read into memory,
        those that can be. Raises `UsageError` for a count below 1.
        """
        if count < 1:
            raise UsageError(f"fixed(count={count}): expected at least 1 pair")
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
        whole, rest = divmod(pairs, self.batch_size * world)
        return whole + (rest > 0 and not self.drop_last)

    def _make(self, pair: Tensor, images: Tensor, rows: Tensor, seed: int, device: torch.device) -> dict[str, Tensor]:
        """A batch of the pairs `(b 2)` of whose images both are among `rows`, which are sorted."""
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
        """For each image on the left the index of the one on its right, which is read within `reach` places of it."""
        labels, n = self.split.labels, len(self.split)
        place = torch.arange(n)
        if reach < n:  # else any image is as near as another, and `left` need not hold each of them once
            place[left] = torch.arange(n)
        keys = labels * n + place
        order = keys.argsort()  # by class, and within a class by place
        counts = torch.bincount(labels, minlength=len(self.classes))
        starts = counts.cumsum(0) - counts
        present = counts.nonzero().squeeze(1)  # classes that have images
        own = labels[left]
        which = torch.searchsorted(present, own)
        step = torch.randint(1, len(present), own.shape, generator=generator)
        other = torch.rand(own.shape, generator=generator) < self.different
        chosen = torch.where(other, present[(which + step) % len(present)], own)
        # Those of a class within reach stand together in `order`. Of its own class any but the image itself.
        first = torch.searchsorted(keys[order], chosen * n + (place[left] - reach).clamp(min=0))
        last = torch.searchsorted(keys[order], chosen * n + (place[left] + reach).clamp(max=n - 1), right=True)
        among = last - first - (~other).long()
        first = torch.where(among > 0, first, starts[chosen])
        among = torch.where(among > 0, among, counts[chosen] - (~other).long()).clamp(min=1)
        drawn = (torch.rand(own.shape, generator=generator, dtype=torch.float64) * among).long().minimum(among - 1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(n)
        skipped = ~other & (counts[own] > 1) & (drawn >= inverse[left] - first)
        return order[first + drawn + skipped.long()]


def _check_classes(count: int) -> None:
    if count < 2:
        raise UsageError(f"pairs and their captions need a dataset of at least two classes; given {count}")


__all__ = ["CAPTION", "Pairs", "captions"]
