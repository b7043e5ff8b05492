"""Datasets: built by name, from the store or by a plugin."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from vitkit.component_arguments import check_arguments
from vitkit.contracts import LazyImages
from vitkit.data.preprocess import Preprocessing
from vitkit.data.split import ImageSplit, proportional_indices
from vitkit.data.store import Stored, read_store, store_lock, store_path, stored_names, write_store
from vitkit.errors import MissingDatasetError, UnknownNameError, UsageError, nearest, printable
from vitkit.registry import Spec, datasets
from vitkit.validation import at_least

VAL_SHARE = 0.1
"""Share of the training images that becomes the validation split of a dataset without one."""
MAX_VAL_IMAGES = 5000
DIGEST_IMAGES = 1000
"""Images of each split whose pixels a digest reads."""
MOMENTS_VALUES = 30_000_000
"""Approximate number of pixel values that the mean and standard deviation are computed from."""


@dataclass(frozen=True)
class ImageDataset:
    """Three splits of images, and facts that a person needs to judge results on them: `contracts.Dataset`.

    Without `val`, validation images are split off `train`: `val_size` images, by default a tenth and at most 5,000, drawn with a fixed
    seed from each class in proportion, at least one from a class of two. `val_size=0` leaves `train` as it is and `val`
    empty. `val_note` describes the source of the validation images.

    `hub_id` is the id on the Hugging Face Hub; `notice` is a warning that results on this dataset need; `fallback_for` names the dataset
    that this one replaces; `skipped` has a line for each image that was left out.
    """

    name: str
    classes: list[str]
    train: ImageSplit
    test: ImageSplit
    source: str = ""
    licence: str = ""
    hub_id: str = ""
    fallback_for: str | None = None
    notice: str = ""
    skipped: list[str] = field(default_factory=list)
    spec: Spec | None = None
    val: ImageSplit = None  # type: ignore[assignment]  # set below
    val_note: str = ""
    val_size: int | None = None

    def __post_init__(self) -> None:
        train, val, note = self.train, self.val, self.val_note
        if val is None:
            train, val, note = held_out(train, self.val_size)
        note = note or f"{len(val):,} images of the validation split that {self.name} has"
        # A split knows the names of its classes, so that a model trained on it does too.
        splits = {"train": train, "val": val, "test": self.test}
        values = {name: replace(split, classes=tuple(self.classes)) for name, split in splits.items()}
        for name, value in (*values.items(), ("val_note", note)):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.preprocessing.shape

    @property
    def mean(self) -> tuple[float, ...]:
        return self.train.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.train.preprocessing.std

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the data: the classes, all labels, and the stored pixels of up to 1,000 images a split.

        It depends neither on the dataset's name nor on the size that images are delivered at. Pixels of lazy images are not read.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.val, self.test):
            digest.update(repr(tuple(split.images.shape)).encode())
            digest.update(split.labels.numpy().tobytes())
            if isinstance(split.images, Tensor):
                rows = torch.arange(0, len(split), len(split) // DIGEST_IMAGES + 1)
                digest.update(split.images.index_select(0, rows).numpy().tobytes())
        return digest.hexdigest()[:16]

    def resized(self, img_size: int) -> "ImageDataset":
        """The same images delivered at another size; `UsageError` below one pixel."""
        at_least(1, img_size=img_size)
        return self.with_preprocessing(replace(self.train.preprocessing, shape=(self.shape[0], img_size, img_size)))

    def with_preprocessing(self, preprocessing: Preprocessing) -> "ImageDataset":
        """The same images delivered as a trained model needs them.

        Grey and RGB images are converted into each other as `Preprocessing.pixels` says; `UsageError` for other numbers of channels.
        """
        if {preprocessing.shape[0], self.shape[0]} not in ({self.shape[0]}, {1, 3}):
            raise UsageError(f"images of {self.name} have {self.shape[0]} channels; expected {preprocessing.shape[0]}")
        splits = {name: replace(getattr(self, name), preprocessing=preprocessing) for name in ("train", "val", "test")}
        return replace(self, **splits)


def held_out(train: ImageSplit, size: int | None = None, *, seed: int = 0) -> tuple[ImageSplit, ImageSplit, str]:
    """Split `train` into a training and a validation split; returns both and a sentence that describes the validation split.

    `size` images, by default a tenth and at most 5,000, are drawn by `seed` from each class in proportion.
    """
    at_least(0, val_size=size)
    if size is None:
        size = min(round(VAL_SHARE * len(train)), MAX_VAL_IMAGES)
        size = max(size, 1)
    rows = proportional_indices(train.labels, size, seed)
    if not len(rows):
        return train, train.subset(rows), "none: all training images are used for training"
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[rows] = False
    note = f"{len(rows):,} of {len(train):,} training images, stratified, seed {seed}"
    return train.subset(rest.nonzero().squeeze(1)), train.subset(rows), note


def from_store(
    stored: Stored,
    *,
    img_size: int | None = None,
    fit: Literal["pad", "resize"] = "resize",
    source: str = "",
    licence: str = "",
    hub_id: str = "",
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    val_size: int | None = None,
    val_note: str = "",
    notice: str = "",
) -> ImageDataset:
    """A dataset from the store's tensors; mean and std are computed from the training pixels where not given.

    Batches deliver images of `img_size`, resized or padded on the device, so that a store file serves every size. `val_size` is as in
    `ImageDataset`. Raises `UsageError` for an `img_size` below 1, and for a `val_size` if the file has a validation split.
    """
    if stored.val is not None and val_size is not None:
        raise UsageError(f"val_size is {val_size}, but {stored.name} has a validation split; leave val_size out")
    unscaled = Preprocessing((stored.train.images.shape[1],) * 3, (), ())
    train, test = (ImageSplit(split.images, split.labels, unscaled) for split in (stored.train, stored.test))
    if stored.val is not None:
        val = ImageSplit(stored.val.images, stored.val.labels, unscaled)
    else:
        train, val, val_note = held_out(train, val_size)
    channels, height, width = stored.train.images.shape[1:]
    preprocessing = Preprocessing((channels, height, width), *(moments or pixel_moments(train.images)), fit)
    train, val, test = (replace(split, preprocessing=preprocessing) for split in (train, val, test))
    dataset = ImageDataset(
        stored.name, stored.classes, train, test, source, licence, hub_id, notice=notice, skipped=stored.skipped, val=val, val_note=val_note
    )
    return dataset if img_size is None else dataset.resized(img_size)


def imported(name: str, *, img_size: int | None = None, val_size: int | None = None) -> ImageDataset:
    """A dataset that `vitkit data import` wrote into the store, delivered at `img_size`; errors as `read_store` and `from_store`."""
    stored = read_store(store_path(name))
    return from_store(stored, img_size=img_size, val_size=val_size, source=f"imported as {name}", licence="its owner's")


def build(name: str, **kwargs: Any) -> ImageDataset:
    """A registered dataset, or else the one that was imported into the store under `name`.

    Raises `UnknownNameError` if there is neither, `ArgumentsError` for arguments that do not fit, `DatasetError`.
    """
    stored = [] if ":" in name or name in datasets else stored_names()
    if name in stored:
        check_arguments(f"dataset {name!r}", imported, {"name": name, **kwargs})
        return imported(name, **kwargs)
    try:
        built: ImageDataset = datasets.build(name, **kwargs)
    except UnknownNameError as error:
        more = sorted(set(stored) - set(datasets.names()))
        if not more:
            raise
        raise UnknownNameError(f"{error}; in the store: {', '.join(more)}{nearest(name, more)}") from None
    return built


def resolve(name: str, *, default: str, **kwargs: Any) -> ImageDataset:
    """A dataset by name; `auto` is `default`, or the embedded `digits` with a `notice` where that is not available.

    A dataset that is named never falls back, and neither does a broken store file. Errors are those of `build`.
    """
    if name != "auto":
        return build(name, **kwargs)
    try:
        return build(default, **kwargs)
    except MissingDatasetError as error:
        return stand_in(default, f"{default} is neither in the dataset store nor could it be downloaded", f"({error})", **kwargs)


def stand_in(wanted: str, reason: str, details: str = "", **kwargs: Any) -> ImageDataset:
    """The embedded `digits` in place of the dataset `wanted`, with a `notice` that gives the reason."""
    digits = build("digits", **kwargs)
    notice = (
        f"{reason}: training on scikit-learn's digits instead, {len(digits.train):,} small images. "
        f"These numbers are NOT {wanted}'s. {details}"
    )
    return replace(digits, fallback_for=wanted, notice=notice.rstrip())


def fetched(name: str, fetch: Callable[[], tuple[dict[str, Tensor], list[str]]]) -> Stored:
    """The store's copy of a dataset, downloaded and converted by `fetch` where there is none yet.

    One process downloads; the others wait for it. Raises `MissingDatasetError` with the cause if the download
    fails, and `DatasetError` as `write_store` and `read_store` do.
    """
    path = store_path(name)
    if not path.exists():
        with store_lock(name):
            if not path.exists():
                write_store(name, *_downloaded(name, fetch))
    return read_store(path)


def _downloaded(
    name: str, fetch: Callable[[], tuple[dict[str, Tensor], list[str]]]
) -> tuple[dict[str, Tensor], list[str]]:
    try:
        return fetch()
    except Exception as error:  # network, archive and checksum errors of many libraries
        raise MissingDatasetError(
            f"dataset {name!r} is not in the store ({store_path(name)}) and could not be downloaded: "
            f"{type(error).__name__}: {printable(' '.join(str(error).split()), 500)}; on a machine with a network run "
            f"`vitkit data get {name}` and copy the file there, or use --dataset digits"
        ) from None


def pixel_moments(images: Tensor | LazyImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 `(n c h w)` scaled to [0, 1], over about 30 million values at most."""
    count = MOMENTS_VALUES // int(torch.Size(images.shape[1:]).numel()) + 1
    # A random sample, because every k-th image may be unlike the others: in MNIST two groups of writers alternate.
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].sort().values
    sample = images if isinstance(images, Tensor) and count >= len(images) else images.index_select(0, rows)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in sample.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean.append(float((share * values).sum()))
        variance = float((share * (values - mean[-1]).square()).sum())
        std.append(max(variance**0.5, 1e-3))  # a channel of one value stays finite
    return tuple(mean), tuple(std)


__all__ = ["ImageDataset", "build", "fetched", "from_store", "held_out", "imported", "pixel_moments", "resolve", "stand_in"]
