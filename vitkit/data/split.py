"""One split of a dataset: its images, labels and preprocessing; subsets, masked labels, batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitkit.contracts import UNLABELLED, LazyImages
from vitkit.data.dataloader import ImageBatches, View
from vitkit.data.preprocess import Preprocessing
from vitkit.errors import UsageError
from vitkit.seeding import derive_seed
from vitkit.transforms.augment import Transform
from vitkit.transforms.mixup import Mixing
from vitkit.validation import at_least, in_range

COPIED_BYTES = 256 << 20
"""A subset of a tensor up to this size is copied; a larger subset reads its rows from the full tensor when they are needed."""
READ_ROWS = 256


@dataclass(frozen=True)
class ImageSplit:
    """One split: `images` uint8 `(n c h w)`, `labels` int64 `(n,)`, and how batches are prepared.

    `images` is a memory-mapped tensor, or `contracts.LazyImages`, which are read when a batch needs them.
    """

    images: Any
    labels: Tensor
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    """Names of the classes; a dataset sets those of its splits."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSplit":
        """The images at `indices`, in that order, copied into memory; lazy images and subsets beyond `COPIED_BYTES` stay unread."""
        images = self.images
        if isinstance(images, LazyImages):
            images = images.subset(indices)
        elif len(indices) * images[:1].nbytes > COPIED_BYTES:
            images = ImageRows(images, indices)
        else:
            images = images.index_select(0, indices)
        return replace(self, images=images, labels=self.labels[indices])

    def in_memory(self) -> "ImageSplit":
        """This split with a tensor of images; lazy images are all read into memory, without the unreadable ones."""
        if not isinstance(self.images, LazyImages):
            return self
        parts = list(self.read(torch.arange(len(self)).split(READ_ROWS)))
        images = [images for images, _ in parts] or [torch.empty((0, *self.images.shape[1:]), dtype=torch.uint8)]
        rows = [rows for _, rows in parts] or [torch.arange(0)]
        return replace(self, images=torch.cat(images), labels=self.labels[torch.cat(rows)])

    def read(self, shares: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each index tensor `(m,)` its images uint8 `(k c h w)` and their indices `(k,)`.

        k is m; for lazy images it is the number of readable images, and `skipped` names the others.
        """
        if isinstance(self.images, LazyImages):
            yield from self.images.read(shares)
            return
        for share in shares:
            # Advanced indexing, images[indices], takes several times as long as index_select.
            yield self.images.index_select(0, share), share

    def order(self, generator: torch.Generator, size: int) -> Tensor:
        """A permutation of all indices, for batches of `size` over all ranks; lazy images choose one that is cheap to read."""
        if isinstance(self.images, LazyImages):
            return self.images.order(generator, size)
        return torch.randperm(len(self), generator=generator)

    @property
    def locality(self) -> int:
        """Images at most this many positions apart in `order` are cheap to read together; n or more means random access."""
        return self.images.locality if isinstance(self.images, LazyImages) else len(self)

    @property
    def skipped(self) -> list[str]:
        """A line for each lazy image that could not be read so far."""
        return list(self.images.skipped) if isinstance(self.images, LazyImages) else []

    def stratified_subset(self, count: int, *, seed: int = 0) -> "ImageSplit":
        """At most `count` images, as many of each class as possible, drawn by `seed`; `UsageError` for a count below 1."""
        at_least(1, count=count)
        return self if count >= len(self) else self.subset(stratified_indices(self.labels, count, seed))

    def mask_labels(self, fraction: float, *, seed: int = 0) -> "ImageSplit":
        """The same images, with the labels of all but a `fraction` of them `UNLABELLED`, evenly over the classes.

        Raises `UsageError` if `fraction` lies outside (0, 1] or leaves no label.
        """
        in_range(0, 1, low_included=False, fraction=fraction)
        count = round(fraction * len(self))
        if count < 1:
            raise UsageError(f"fraction is {fraction}; of {len(self):,} images it leaves no label, expected at least one")
        kept = stratified_indices(self.labels, count, seed)
        labels = torch.full_like(self.labels, UNLABELLED)
        labels[kept] = self.labels[kept]
        return replace(self, labels=labels)

    def oversample_labelled(self, share: float) -> "ImageSplit":
        """All images, with labelled ones repeated until they are about `share` of the split.

        Use it if only few images have labels, so that most batches would hold none. Raises `UsageError` for a share outside [0, 1) and if
        there is no label.
        """
        in_range(0, 1, high_included=False, share=share)
        labelled = (self.labels != UNLABELLED).nonzero().squeeze(1)
        if not len(labelled):
            raise UsageError("oversample_labelled: no image of this split has a label; expected at least one")
        times = round(share / (1.0 - share) * (len(self) - len(labelled)) / len(labelled))
        return self if times <= 1 else self.subset(torch.cat([torch.arange(len(self)), labelled.repeat(times - 1)]))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Transform | None = None,
        views: int | Sequence[View] = 1,
        mix: Mixing | None = None,
    ) -> ImageBatches:
        """This split in batches of normalised images `(b c h w)`, or `(b v c h w)` for several augmented views.

        With a sequence of `View`s a batch holds `views`, a tuple of tensors `(b v c h w)`, one for each `View`, and the first of them
        also as `images`; `augment` and `mix` are then not allowed.

        With `mix` augmented images are mixed in pairs within a rank's batch, all views of an image in the same way, and a batch also holds
        `partners` int64 `(b,)`, the labels of the images mixed in, and `weights` float32 `(b,)`: `labels` count by `weights`,
        `partners` by 1 − `weights`. The two labels of an image are both known or both `UNLABELLED`.
        """
        return ImageBatches(self, batch_size, shuffle, drop_last, augment, views if isinstance(views, int) else tuple(views), mix)


@dataclass(frozen=True)
class ImageRows:
    """The rows `rows` int64 `(n,)` of a memory-mapped tensor, as `contracts.LazyImages`: nothing is copied until it is read."""

    images: Tensor
    rows: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, height, width = self.images.shape[1:]
        return len(self.rows), channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @property
    def ndim(self) -> int:
        return 4

    @property
    def skipped(self) -> list[str]:
        return []

    @property
    def locality(self) -> int:
        return len(self)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, shares: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for share in shares:
            yield self.index_select(0, share), share

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self.images.index_select(dim, self.rows[index])

    def subset(self, rows: Tensor) -> "ImageRows":
        return replace(self, rows=self.rows[rows])

    def order(self, generator: torch.Generator, size: int) -> Tensor:
        return torch.randperm(len(self), generator=generator)


def stratified_indices(labels: Tensor, count: int, seed: int) -> Tensor:
    """Sorted indices of `count` samples, round-robin over the classes, shuffled within each."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(seed)))
    place = _place_in_class(labels[order])
    return order[place.argsort(stable=True)[:count]].sort().values


def proportional_indices(labels: Tensor, count: int, seed: int) -> Tensor:
    """Sorted indices of about `count` samples, drawn from each class in proportion to its size.

    A class of two or more gives at least one and keeps at least one; `UNLABELLED` counts as a class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(seed)))
    drawn = labels[order]
    classes, sizes = labels.unique(return_counts=True)
    exact = sizes.double() * (min(count, len(labels)) / max(len(labels), 1))
    quota = exact.floor().long()
    left = min(count, len(labels)) - int(quota.sum())
    quota[(exact - quota).argsort(descending=True, stable=True)[:left]] += 1
    quota = quota.clamp(min=1 if count else 0).minimum(sizes - 1)
    return order[_place_in_class(drawn) < quota[torch.searchsorted(classes, drawn)]].sort().values


def _place_in_class(labels: Tensor) -> Tensor:
    """`(n,)`: how many earlier samples have the same label."""
    order = labels.argsort(stable=True)
    ordered = labels[order]
    places = torch.arange(len(labels))
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    place = torch.empty_like(places)
    place[order] = places - torch.where(first, places, 0).cummax(0).values if len(labels) else places
    return place


__all__ = ["ImageRows", "ImageSplit", "proportional_indices", "stratified_indices"]
