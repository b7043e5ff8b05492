"""Datasets: built from the store or by a plugin, and asked for by name."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vitkit.data.preprocess import Preprocessing
from vitkit.data.split import ImageSplit
from vitkit.data.store import Stored, read_store, store_lock, store_path, stored_names, write_store
from vitkit.errors import MissingDatasetError, UnknownNameError, UsageError, nearest
from vitkit.registry import Spec, check_arguments, datasets


@dataclass(frozen=True)
class ImageDataset:
    """Two splits of labelled images, and what to know of them: `contracts.Dataset`.

    `hub_id` is its id on the Hugging Face Hub, where it has one; `notice` is what a person must be told before they
    believe the numbers; `fallback_for` names the dataset that was wanted where this one only stands in for it; `skipped`
    has a line for each picture that was left out of it.
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

    def __post_init__(self) -> None:
        for name in ("train", "test"):  # so that what is trained on a split knows the classes
            object.__setattr__(self, name, replace(getattr(self, name), classes=tuple(self.classes)))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.preprocessing.shape

    @property
    def mean(self) -> tuple[float, ...]:
        return self.train.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.train.preprocessing.std

    def resized(self, img_size: int) -> "ImageDataset":
        """The same images delivered at another size; `UsageError` below one pixel."""
        if img_size < 1:
            raise UsageError(f"img_size is {img_size}; expected at least 1 pixel")
        return self.with_preprocessing(replace(self.train.preprocessing, shape=(self.shape[0], img_size, img_size)))

    def with_preprocessing(self, preprocessing: Preprocessing) -> "ImageDataset":
        """The same images delivered as a trained model wants them; `UsageError` where it takes other channels."""
        if preprocessing.shape[0] != self.shape[0]:
            raise UsageError(f"images of {self.name} have {self.shape[0]} channels; expected {preprocessing.shape[0]}")
        return replace(self, train=replace(self.train, preprocessing=preprocessing), test=replace(self.test, preprocessing=preprocessing))


def from_store(
    stored: Stored,
    *,
    img_size: int | None = None,
    fit: Literal["pad", "resize"] = "resize",
    source: str = "",
    licence: str = "",
    hub_id: str = "",
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> ImageDataset:
    """A dataset from the store's tensors; mean and std are taken over the training pixels where not given.

    Batches deliver images of `img_size`, resized or padded on the device, so that a store file serves every size.
    Raises `UsageError` for an `img_size` below 1.
    """
    channels, height, width = stored.train.images.shape[1:]
    mean, std = moments or pixel_moments(stored.train.images)
    preprocessing = Preprocessing((channels, height, width), mean, std, fit)
    train, test = (ImageSplit(split.images, split.labels, preprocessing) for split in (stored.train, stored.test))
    dataset = ImageDataset(stored.name, stored.classes, train, test, source, licence, hub_id, skipped=stored.skipped)
    return dataset if img_size is None else dataset.resized(img_size)


def imported(name: str, *, img_size: int | None = None) -> ImageDataset:
    """A dataset that `vitkit data import` wrote into the store, delivered at `img_size`; errors as `read_store`."""
    return from_store(
        read_store(store_path(name)), img_size=img_size, source=f"imported as {name}", licence="its owner's"
    )


def build(name: str, **kwargs: Any) -> ImageDataset:
    """A registered dataset, or else the one that was imported into the store under `name`.

    Raises `UnknownNameError` where there is neither, `ArgumentsError` for arguments that do not fit, `DatasetError`.
    """
    own = [] if ":" in name or name in datasets else stored_names()
    if name in own:
        check_arguments(f"dataset {name!r}", imported, {"name": name, **kwargs})
        return imported(name, **kwargs)
    try:
        built: ImageDataset = datasets.build(name, **kwargs)
    except UnknownNameError as error:
        more = sorted(set(own) - set(datasets.names()))
        if not more:
            raise
        raise UnknownNameError(f"{error}; in the store: {', '.join(more)}{nearest(name, more)}") from None
    return built


def resolve(name: str, *, default: str, **kwargs: Any) -> ImageDataset:
    """A dataset by name; `auto` is `default`, or the embedded `digits` with a `notice` where that cannot be had.

    A dataset named by hand never falls back, nor does a store file that is broken. Errors are those of `build`.
    """
    if name != "auto":
        return build(name, **kwargs)
    try:
        return build(default, **kwargs)
    except MissingDatasetError as error:
        return stand_in(default, f"{default} is neither in the dataset store nor could it be downloaded", f"({error})", **kwargs)


def stand_in(wanted: str, why: str, more: str = "", **kwargs: Any) -> ImageDataset:
    """The embedded `digits` in place of a dataset, with a `notice` that says `why`."""
    found = build("digits", **kwargs)
    notice = (
        f"{why}: training on scikit-learn's digits instead, {len(found.train):,} small images. "
        f"These numbers are NOT {wanted}'s. {more}"
    )
    return replace(found, fallback_for=wanted, notice=notice.rstrip())


def fetched(name: str, fetch: Callable[[], tuple[dict[str, Tensor], list[str]]]) -> Stored:
    """The store's copy of a dataset, downloaded and converted by `fetch` where there is none yet.

    One process downloads; the others wait for it. Raises `MissingDatasetError` with what was tried where the download
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
        said = " ".join(str(error).split())
        raise MissingDatasetError(
            f"dataset {name!r} is not in the store ({store_path(name)}) and could not be downloaded: "
            f"{type(error).__name__}: {said[:500]}; on a machine with a network run `vitkit data get {name}` and copy "
            f"the file there, or use --dataset digits"
        ) from None


def pixel_moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 `(n c h w)` scaled to [0, 1], over about 30 million values at most."""
    some, count = images, 30_000_000 // images[0].numel() + 1
    if count < len(images):
        # Drawn, for every k-th need not be like the others: MNIST's writers alternate.
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        some = images.index_select(0, drawn.sort().values)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in some.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean.append(float((share * values).sum()))
        variance = float((share * (values - mean[-1]).square()).sum())
        std.append(max(variance**0.5, 1e-3))  # a channel of one value stays finite
    return tuple(mean), tuple(std)


__all__ = ["ImageDataset", "build", "fetched", "from_store", "imported", "pixel_moments", "resolve", "stand_in"]
