"""Datasets as batches of tensors: cut from memory-mapped images and augmented as whole batches on the device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.augment import Transform
from vitkit.errors import DatasetError, UsageError
from vitkit.registry import datasets
from vitkit.store import Stored, read_store, store_directory, store_path, stored_names, write_store

HIDDEN = -1
"""The label of an image whose label is not shown."""


@dataclass(frozen=True)
class ImageSplit:
    """One split: `images` uint8 `(n c h w)`, memory-mapped, `labels` int64 `(n,)`, and how batches are prepared."""

    images: Tensor
    labels: Tensor
    prepare: "Preparation"

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSplit":
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def take(self, count: int, *, seed: int = 0) -> "ImageSplit":
        """`count` images, the classes as evenly as they can be had, chosen by `seed`; all where there are no more."""
        return self if count >= len(self) else self.subset(_evenly(self.labels, count, seed))

    def hide_labels(self, fraction: float, *, seed: int = 0) -> "ImageSplit":
        """The same images, with the labels of all but a `fraction` of them hidden (−1), evenly over the classes.

        Raises `UsageError` where `fraction` lies outside (0, 1] or leaves no label.
        """
        if not 0.0 < fraction <= 1.0 or round(fraction * len(self)) < 1:
            raise UsageError(f"a label fraction lies in (0, 1] and leaves at least one label; given {fraction}")
        shown = _evenly(self.labels, round(fraction * len(self)), seed)
        labels = torch.full_like(self.labels, HIDDEN)
        labels[shown] = self.labels[shown]
        return replace(self, labels=labels)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Transform | None = None,
        views: int = 1,
    ) -> "ImageBatches":
        """This split in batches of normalised images `(b c h w)`, or `(b v c h w)` for several augmented views."""
        return ImageBatches(self, batch_size, shuffle=shuffle, drop_last=drop_last, augment=augment, views=views)


@dataclass(frozen=True)
class Preparation:
    """From stored pixels to what a model sees: size, scale, mean and standard deviation.

    `fit` "pad" surrounds a smaller image with black (LeNet's way with MNIST), "resize" resizes it, antialiased.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["pad", "resize"] = "resize"

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 `(n c h w)` → float in [0, 1] of this size."""
        images = images.float().div_(255)
        height, width = self.shape[1:]
        down, across = height - images.shape[2], width - images.shape[3]
        if not down and not across:
            return images
        if self.fit == "pad" and down >= 0 and across >= 0:
            return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(x − mean)/std per channel; images `(… c h w)` in [0, 1]."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images - mean) / std

    def to_json(self) -> dict[str, Any]:
        """As `config.json` keeps it."""
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std), "fit": self.fit}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Preparation":
        """The inverse of `to_json`; `UsageError` where it is something else."""
        try:
            channels, height, width = (int(size) for size in data["shape"])
            mean, std = tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
            known = data["fit"] in ("pad", "resize") and len(mean) == len(std) == channels
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise UsageError(f"preprocessing names shape, mean, std and fit; given {data!r:.120}")
        return cls((channels, height, width), mean, std, data["fit"])


class ImageBatches:
    """A split, cut into batches: `contracts.Batches`.

    The order of an epoch comes from (seed, epoch), the augmentation of a batch from (seed, epoch, index, rank), so an
    epoch can be entered anywhere. On several ranks each takes its share of every batch of `batch_size · world` images;
    with `drop_last` an uneven rest is left out, and without it every image comes once, the last shares one image
    shorter or empty.
    """

    def __init__(
        self,
        split: ImageSplit,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Transform | None = None,
        views: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; expected at least 1")
        if views < 1:
            raise UsageError(f"views is {views}; expected at least 1")
        self.split, self.batch_size, self.shuffle, self.drop_last = split, batch_size, shuffle, drop_last
        self.augment, self.views = augment, views

    def __len__(self) -> int:
        return self.count(1)

    def count(self, world: int) -> int:
        """Batches an epoch on each of `world` ranks."""
        whole, rest = divmod(len(self.split), self.batch_size * world)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch from number `start` on, on `device`."""
        n = len(self.split)
        order = torch.arange(n)
        if self.shuffle:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(_seed(seed, number)))
        size = self.batch_size * world
        for index in range(start, self.count(world)):
            share = order[index * size : (index + 1) * size].tensor_split(world)[rank]
            yield self._make(share.sort().values if self.shuffle else share, _seed(seed, number, index, rank), device)

    def _make(self, indices: Tensor, seed: int, device: Any) -> dict[str, Tensor]:
        prepare = self.split.prepare
        # Sorted indices read a memory-mapped file in one direction; within a batch the order means nothing.
        raw = self.split.images[indices].to(device, non_blocking=True)
        labels = self.split.labels[indices].to(device, non_blocking=True)
        images = prepare.pixels(raw)
        if self.views > 1:
            images = images.repeat_interleave(self.views, dim=0)
        if self.augment is not None:
            images = self.augment(images, torch.Generator(images.device).manual_seed(seed))
        images = prepare.normalise(images)
        if self.views > 1:
            images = images.view(-1, self.views, *images.shape[1:])  # (b·v c h w) → (b v c h w)
        return {"images": images, "labels": labels}


@dataclass(frozen=True)
class ImageDataset:
    """Two splits of labelled images, and what to know of them: `contracts.Dataset`."""

    name: str
    classes: list[str]
    train: ImageSplit
    test: ImageSplit
    source: str = ""
    licence: str = ""
    fallback_for: str | None = None
    notice: str = ""
    skipped: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.prepare.shape

    @property
    def mean(self) -> tuple[float, ...]:
        return self.train.prepare.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.train.prepare.std

    def resized(self, img_size: int) -> "ImageDataset":
        """The same images delivered at another size; `UsageError` below one pixel."""
        if img_size < 1:
            raise UsageError(f"img_size is {img_size}; expected at least 1 pixel")
        prepare = replace(self.train.prepare, shape=(self.shape[0], img_size, img_size))
        return replace(self, train=replace(self.train, prepare=prepare), test=replace(self.test, prepare=prepare))


def from_store(
    stored: Stored,
    *,
    img_size: int | tuple[int, int] | None = None,
    fit: Literal["pad", "resize"] = "resize",
    source: str = "",
    licence: str = "",
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> ImageDataset:
    """A dataset from the store's tensors; mean and std are taken over the training pixels where not given."""
    images = stored.tensors["train.images"]
    height, width = images.shape[2:]
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < 1:
            raise UsageError(f"img_size is {img_size}; expected at least 1 pixel")
    mean, std = moments or _moments(images)
    prepare = Preparation((images.shape[1], height, width), mean, std, fit)
    splits = {
        name: ImageSplit(stored.tensors[f"{name}.images"], stored.tensors[f"{name}.labels"], prepare)
        for name in ("train", "test")
    }
    return ImageDataset(stored.name, stored.classes, **splits, source=source, licence=licence)


def resolve(name: str, *, default: str, **kwargs: Any) -> ImageDataset:
    """A dataset by name; `auto` is `default`, or the embedded `digits` with a `notice` where that cannot be had.

    A name that no plugin registers but that stands in the store, because somebody imported it, is read from there.
    Raises `UnknownNameError` and `DatasetError`; a dataset named by hand never falls back.
    """
    if name != "auto":
        return build(name, **kwargs)
    try:
        return build(default, **kwargs)
    except DatasetError as error:
        found: ImageDataset = datasets.build("digits", **kwargs)
        notice = (
            f"{default} is neither in the dataset store nor could it be downloaded: training on scikit-learn's digits "
            f"instead, {len(found.train):,} small images. These numbers are NOT {default}'s. ({error})"
        )
        return replace(found, fallback_for=default, notice=notice)


def build(name: str, **kwargs: Any) -> ImageDataset:
    """A registered dataset, or one that was imported into the store under `name`."""
    if name not in datasets.names() and ":" not in name and name in stored_names():
        return from_store(read_store(store_path(name)), source=f"imported into {store_directory()}", **kwargs)
    built: ImageDataset = datasets.build(name, **kwargs)
    return built


def fetched(name: str, fetch: Callable[[], tuple[dict[str, Tensor], list[str]]]) -> Stored:
    """The store's copy of a dataset, downloaded and converted by `fetch` where there is none yet.

    Raises `DatasetError` with what was tried where the download fails.
    """
    path = store_path(name)
    if not path.exists():
        try:
            tensors, classes = fetch()
        except Exception as error:  # network, archive and checksum errors of many libraries
            raise DatasetError(
                f"dataset {name!r} is not in the store ({path}) and could not be downloaded: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; on a machine with a "
                f"network run `vitkit data get {name}` and copy the file there, or use --dataset digits"
            ) from None
        write_store(name, tensors, classes)
    return read_store(path)


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1], over at most 10,000 images evenly spread."""
    some = images[:: max(len(images) // 10_000, 1)].float().div_(255)
    std = some.std(dim=(0, 2, 3)).clamp(min=1e-3)
    return tuple(some.mean(dim=(0, 2, 3)).tolist()), tuple(std.tolist())


def _evenly(labels: Tensor, count: int, seed: int) -> Tensor:
    """Sorted indices of `count` samples, round-robin over the classes, shuffled within each."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_seed(seed, 0)))
    shuffled = labels[order]
    place = torch.zeros_like(shuffled)
    for label in shuffled.unique():
        mask = shuffled == label
        place[mask] = torch.arange(int(mask.sum()))
    return order[place.argsort(stable=True)[:count]].sort().values


def _seed(*parts: int) -> int:
    """A generator's seed that depends on every part: torch's own mixing of nearby seeds is weak."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:
        mixed = ((mixed ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


__all__ = [
    "HIDDEN", "ImageBatches", "ImageDataset", "ImageSplit", "Preparation", "build", "fetched", "from_store",
    "read_store", "resolve", "store_directory", "store_path", "write_store",
]  # fmt: skip
