"""Batches cut from memory-mapped images, sized, augmented and normalised as a whole on the device."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitkit.contracts import UNLABELLED, LazyImages
from vitkit.data.preprocess import Preprocessing
from vitkit.distributed.collectives import world_size
from vitkit.errors import UsageError
from vitkit.seeding import derive_seed
from vitkit.transforms.augment import Transform
from vitkit.transforms.mixup import Mixing


@dataclass(frozen=True)
class ImageSplit:
    """One split: `images` uint8 `(n c h w)`, `labels` int64 `(n,)`, and how batches are prepared.

    `images` is a memory-mapped tensor, or `contracts.LazyImages`, which are read when a batch takes them.
    """

    images: Any
    labels: Tensor
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    """Names of the classes; a dataset sets those of its splits."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSplit":
        """The images at `indices`, in that order: a copy of these alone, in memory, unless images are read lazily."""
        lazy = isinstance(self.images, LazyImages)
        images = self.images.subset(indices) if lazy else self.images.index_select(0, indices)
        return replace(self, images=images, labels=self.labels[indices])

    def in_memory(self) -> "ImageSplit":
        """This split with a tensor of images; of lazy ones those that can be read, all in memory."""
        if not isinstance(self.images, LazyImages):
            return self
        parts = list(self.read(torch.arange(len(self)).split(256)))
        images = [images for images, _ in parts] or [torch.empty((0, *self.images.shape[1:]), dtype=torch.uint8)]
        rows = [rows for _, rows in parts] or [torch.arange(0)]
        return replace(self, images=torch.cat(images), labels=self.labels[torch.cat(rows)])

    def read(self, shares: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each index tensor `(m,)` its images uint8 `(k c h w)` and their indices `(k,)`.

        These are all m, or of lazy images those that can be read; the others are named in `skipped`.
        """
        if isinstance(self.images, LazyImages):
            yield from self.images.read(shares)
            return
        for share in shares:
            # Advanced indexing, images[indices], takes several times as long as index_select.
            yield self.images.index_select(0, share), share

    def order(self, generator: torch.Generator, size: int) -> Tensor:
        """A permutation of all indices, for batches of `size` over all ranks; lazy images are read as suits them."""
        if isinstance(self.images, LazyImages):
            return self.images.order(generator, size)
        return torch.randperm(len(self), generator=generator)

    @property
    def locality(self) -> int:
        """How many places of `order` apart images may lie that are read at the same time: all, but for lazy images."""
        return self.images.locality if isinstance(self.images, LazyImages) else len(self)

    @property
    def skipped(self) -> list[str]:
        """A line for each lazy image that could not be read so far and was left out."""
        return list(self.images.skipped) if isinstance(self.images, LazyImages) else []

    def stratified_subset(self, count: int, *, seed: int = 0) -> "ImageSplit":
        """`count` images, the classes as evenly as they can be had, chosen by `seed`; all where there are no more.

        Raises `UsageError` for fewer than one.
        """
        if count < 1:
            raise UsageError(f"stratified_subset({count}): expected at least 1 image")
        return self if count >= len(self) else self.subset(stratified_indices(self.labels, count, seed))

    def mask_labels(self, fraction: float, *, seed: int = 0) -> "ImageSplit":
        """The same images, with the labels of all but a `fraction` of them hidden (−1), evenly over the classes.

        Raises `UsageError` where `fraction` lies outside (0, 1] or leaves no label.
        """
        if not 0.0 < fraction <= 1.0 or round(fraction * len(self)) < 1:
            raise UsageError(f"a label fraction lies in (0, 1] and leaves at least one label; given {fraction}")
        shown = stratified_indices(self.labels, round(fraction * len(self)), seed)
        labels = torch.full_like(self.labels, UNLABELLED)
        labels[shown] = self.labels[shown]
        return replace(self, labels=labels)

    def oversample_labelled(self, share: float) -> "ImageSplit":
        """All images, those whose label is shown as often as it takes them to make up `share` of the whole.

        Where few labels are shown, a batch would otherwise hold next to none. Raises `UsageError` for a share outside
        [0, 1) and where no label is shown.
        """
        shown = (self.labels != UNLABELLED).nonzero().squeeze(1)
        if not 0.0 <= share < 1.0 or not len(shown):
            raise UsageError(f"oversample_labelled({share}): expected a share in [0, 1), and at least one label that is shown")
        times = round(share / (1.0 - share) * (len(self) - len(shown)) / len(shown))
        return self if times <= 1 else self.subset(torch.cat([torch.arange(len(self)), shown.repeat(times - 1)]))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Transform | None = None,
        views: int = 1,
        mix: Mixing | None = None,
    ) -> "ImageBatches":
        """This split in batches of normalised images `(b c h w)`, or `(b v c h w)` for several augmented views.

        With `mix` augmented images are mixed in pairs within a rank's batch, all views of an image alike, and a batch
        also holds `partners` int64 `(b,)`, the labels of the images mixed in, and `weights` float32 `(b,)`, by which
        `labels` count; `partners` count by 1 − `weights`. An image's two labels are both shown or both hidden (−1).
        """
        return ImageBatches(self, batch_size, shuffle, drop_last, augment, views, mix)


@dataclass(frozen=True)
class ImageBatches:
    """A split, cut into batches of `batch_size` a rank: `contracts.Batches`.

    The order of an epoch comes from (seed, epoch), a batch's augmentation and mixing from (seed, epoch, index, rank), so
    an epoch can be entered anywhere. W ranks share each run of W · `batch_size` images. The rest at an epoch's end is left
    out with `drop_last`; without it every image comes exactly once, and the ranks' last batches differ by up to one
    image, so that one may be empty. Raises `UsageError` for a `batch_size` or `views` below 1.
    """

    split: ImageSplit
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    augment: Transform | None = None
    views: int = 1
    mix: Mixing | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "views"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")

    def __len__(self) -> int:
        """Batches an epoch, the same number on every rank."""
        return self._count(world_size())

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images are prepared: what a model that is trained on them must be given."""
        return self.split.preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, empty for a split that belongs to no dataset."""
        return self.split.classes

    @property
    def skipped(self) -> list[str]:
        """A line for each image that could not be read so far and was left out of its batch."""
        return self.split.skipped

    def _count(self, world: int) -> int:
        whole, rest = divmod(len(self.split), self.batch_size * world)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch from index `start` on, on `device`."""
        size, indices = self.batch_size * world, range(start, self._count(world))
        order = self._order(derive_seed(seed, number), size)
        shares = (order[index * size : (index + 1) * size].tensor_split(world)[rank] for index in indices)
        # Sorted indices read a memory-mapped file in one direction; the order within a shuffled batch means nothing.
        shares = (share.sort().values if self.shuffle else share for share in shares)
        for index, (images, rows) in zip(indices, self.split.read(shares), strict=True):
            yield self._make(images, self.split.labels[rows], derive_seed(seed, number, index, rank), torch.device(device))

    def _order(self, seed: int, size: int) -> Tensor:
        if self.shuffle:
            return self.split.order(torch.Generator().manual_seed(seed), size)
        return torch.arange(len(self.split))

    def _make(self, images: Tensor, labels: Tensor, seed: int, device: torch.device) -> dict[str, Tensor]:
        preprocessing = self.split.preprocessing
        images, labels = preprocessing.pixels(_moved(images, device)), _moved(labels, device)
        generator = torch.Generator(images.device).manual_seed(seed)
        if self.views > 1:
            images = images.repeat_interleave(self.views, dim=0)
        if self.augment is not None:
            images = self.augment(images, generator)
        if self.views > 1:
            images = images.unflatten(0, (len(labels), self.views))  # (b·v c h w) → (b v c h w)
        batch = {"labels": labels}
        if self.mix is not None:
            images, partners, weights = self.mix(images, labels, generator)
            batch |= {"partners": labels[partners], "weights": weights}
        return {"images": preprocessing.normalise(images), **batch}


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy from pinned memory does not wait for what the GPU is still computing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def stratified_indices(labels: Tensor, count: int, seed: int) -> Tensor:
    """Sorted indices of `count` samples, round-robin over the classes, shuffled within each."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(seed)))
    shuffled = labels[order]
    place = torch.zeros_like(shuffled)
    for label in shuffled.unique():
        mask = shuffled == label
        place[mask] = torch.arange(int(mask.sum()))
    return order[place.argsort(stable=True)[:count]].sort().values


__all__ = ["ImageBatches", "ImageSplit", "stratified_indices"]
