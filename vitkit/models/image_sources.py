"""The inputs of a trained model: image files, or a split of a dataset."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vitkit.contracts import LazyImages
from vitkit.data.decode import SUFFIXES, ImageReadError, read_image
from vitkit.data.image_files import class_order, list_images
from vitkit.data.image_folder import folder_labels
from vitkit.errors import DatasetError, UsageError, printable
from vitkit.validation import at_least, one_of

FINGERPRINT_IMAGES = 1000
"""Approximate number of images of a dataset that its fingerprint reads."""


class Preprocessed(Protocol):
    """The part of a model that reading images needs."""

    def preprocess(self, images: Any) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Images `start` … `stop` − 1 of a source: `images` float32 `(m c h w)` of `rows`, and a problem for each other row."""

    start: int
    stop: int
    images: Tensor | None
    rows: list[int]
    problems: dict[int, str]


class Source(Protocol):
    """Images in a fixed order.

    `labels` int64 `(n,)` index `classes`, where they are known; `left_out` has a line for each file that is left out.
    """

    labels: Tensor | None
    classes: list[str]
    left_out: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...

    def batches(self, model: Preprocessed, starts: Sequence[int], size: int) -> Iterator[Batch]: ...


class Files:
    """Image files, decoded by threads while the model computes.

    The folder below `root` that an image lies in, or the one below a split's folder, names its class; `classes` are these names in the
    order of `class_order`. `left_out` has a line for each kind of file that is left out.
    """

    def __init__(self, paths: Sequence[Path], root: Path | None = None, left_out: Sequence[str] = ()) -> None:
        self.paths, self.left_out = list(paths), list(left_out)
        folders = folder_labels(root, self.paths) if root is not None else [""] * len(self.paths)
        self.classes: list[str] = sorted({folder for folder in folders if folder}, key=class_order)
        self.labels: Tensor | None = None
        if len(self.classes) > 1 and all(folders):
            self.labels = torch.tensor([self.classes.index(folder) for folder in folders], dtype=torch.int64)
        else:
            self.classes = []
        self.classes = list(map(printable, self.classes))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def describe(self) -> dict[str, Any]:
        """The metadata of the source in an output, besides its files."""
        return {"classes": self.classes}

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or changed."""
        stats = [path.stat() if path.exists() else None for path in self.paths]
        files = [(str(path), s and (s.st_mtime_ns, s.st_size)) for path, s in zip(self.paths, stats, strict=True)]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def batches(self, model: Preprocessed, starts: Sequence[int], size: int) -> Iterator[Batch]:
        """Batches of `size` images, one from each of `starts`; an image that cannot be read is among its problems."""

        def submit(start: int) -> list[Future[Tensor | str]]:
            return [pool.submit(_prepared, model, path) for path in self.paths[start : start + size]]

        with ThreadPoolExecutor() as pool:
            waiting: list[Future[Tensor | str]] = []
            try:
                for place, start in enumerate(starts):
                    current = waiting if place else submit(start)
                    waiting = submit(starts[place + 1]) if place + 1 < len(starts) else []
                    yield _collected(start, [future.result() for future in current])
            finally:
                for future in waiting:
                    future.cancel()


class DatasetSplit:
    """One split of a dataset: its stored pixels, preprocessed for the model."""

    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset, self.split = dataset, split
        self.images: Tensor | LazyImages = getattr(dataset, split).images
        self.labels: Tensor | None = getattr(dataset, split).labels
        self.classes: list[str] = list(dataset.classes)
        self.left_out: list[str] = []

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.dataset.name}/{self.split}/{index}"

    def describe(self) -> dict[str, Any]:
        """The metadata of the source in an output."""
        return {"dataset": self.dataset.name, "split": self.split, "classes": self.classes}

    def fingerprint(self) -> str:
        """A digest of the name, the labels and, unless they are lazy, about a thousand of the images."""
        digest = hashlib.sha256(repr((self.dataset.name, self.split, tuple(self.images.shape))).encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        if isinstance(self.images, Tensor):
            digest.update(self.images[:: len(self) // FINGERPRINT_IMAGES + 1].numpy().tobytes())
        return digest.hexdigest()

    def batches(self, model: Preprocessed, starts: Sequence[int], size: int) -> Iterator[Batch]:
        """Batches of `size` images, one from each of `starts`; a lazy image that cannot be read is among its problems."""
        shares = [torch.arange(start, min(start + size, len(self))) for start in starts]
        images = self.images
        parts = ((images.index_select(0, rows), rows) for rows in shares) if isinstance(images, Tensor) else images.read(shares)
        for share, (pixels, kept) in zip(shares, parts, strict=True):
            rows = kept.tolist()
            problems = dict.fromkeys(sorted({*share.tolist()} - {*rows}), "it cannot be read")
            yield Batch(int(share[0]), int(share[-1]) + 1, model.preprocess(pixels) if rows else None, rows, problems)


def prepared(model: Preprocessed, images: Any, batch_size: int) -> Iterator[Tensor]:
    """Batches of preprocessed images of a folder, image files, Pillow images or uint8 `(n c h w)`.

    Raises `UsageError` for another type and for an image that cannot be read.
    """
    at_least(1, batch_size=batch_size)
    if isinstance(images, str | Path):
        path = Path(images).expanduser()
        images = images_below(path) if path.is_dir() else [path]
    if not isinstance(images, Tensor | Sequence) or len(images) == 0:
        raise UsageError(f"images are {images!r:.80}; expected a folder, image files, Pillow images or a uint8 tensor")
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        if not isinstance(batch, Tensor):
            batch = [open_image(image, least=_size(model)) if isinstance(image, str | Path) else image for image in batch]
        yield model.preprocess(batch)


def find_source(images: Sequence[str], *, split: str = "test") -> Source:
    """The source that the arguments of a command name: one folder, one dataset, or files and folders.

    Raises `UsageError` for no argument, an empty one, a file that does not exist and an unknown split; `DatasetError` for a folder
    without images and a dataset that is not available.
    """
    one_of(("train", "val", "test"), **{"--split": split})
    if not images:
        raise UsageError("no images are given; give a folder, a dataset's name, or image files")
    if not all(word.strip() for word in images):
        raise UsageError("an argument for the images is empty, perhaps an unset variable; give a folder, a dataset's name, or files")
    if len(images) == 1 and not Path(images[0]).expanduser().exists() and Path(images[0]).suffix.lower() not in SUFFIXES:
        return DatasetSplit(_dataset(images[0]), split)
    root = Path(images[0]).expanduser() if len(images) == 1 else None
    paths: list[Path] = []
    left_out: list[str] = []
    for word in images:
        path = Path(word).expanduser()
        if path.is_dir():
            listing = list_images(path)
            paths += _not_empty(path, listing.images)
            left_out += [*listing.left_out, *(f"{printable(path)}: {remark}" for remark in listing.remarks)]
        elif path.is_file():
            paths.append(path)
        else:
            if "://" in word:
                raise UsageError(f"{printable(word)} is an address; download the image, and give the file")
            raise UsageError(f"no image at {printable(path)}; give files and folders that exist, or one dataset's name")
    return Files(paths, root if root is not None and root.is_dir() else None, left_out)


def images_below(folder: Path) -> list[Path]:
    """Every image file in a folder and below it, in alphabetical order; `DatasetError` if there is none."""
    return _not_empty(folder, list_images(folder).images)


def _not_empty(folder: Path, paths: list[Path]) -> list[Path]:
    if not paths:
        raise DatasetError(f"{printable(folder)} holds no image: expected {', '.join(SUFFIXES)} files in it or below it")
    return paths


def open_image(path: str | Path, *, least: tuple[int, int] | None = None) -> Image.Image:
    """An image file, decoded as `vitkit.data.read_image` does; `UsageError` with the reason if it is not readable."""
    try:
        return read_image(path, least=least)
    except ImageReadError as error:
        raise UsageError(f"{printable(path)} cannot be read as an image: {printable(error)}") from None


def _dataset(name: str) -> Any:
    from vitkit import data

    try:
        return data.build(name)
    except UsageError as error:
        raise UsageError(f"{name!r} is neither a file, a folder nor a dataset: {error}") from None


def _size(model: Preprocessed) -> tuple[int, int] | None:
    """Height and width of the model's images, where they are resized."""
    preprocessing = getattr(model, "preprocessing", None) or {}
    return (preprocessing["shape"][1], preprocessing["shape"][2]) if preprocessing.get("fit") == "resize" else None


def _prepared(model: Preprocessed, path: Path) -> Tensor | str:
    """An image as the model takes it `(1 c h w)`, or the reason why it is left out."""
    try:
        image = read_image(path, least=_size(model))
    except ImageReadError as error:
        return printable(error)
    return model.preprocess([image])


def _collected(start: int, results: Sequence[Tensor | str]) -> Batch:
    images = [result for result in results if isinstance(result, Tensor)]
    rows = [start + place for place, result in enumerate(results) if isinstance(result, Tensor)]
    problems = {start + place: result for place, result in enumerate(results) if isinstance(result, str)}
    return Batch(start, start + len(results), torch.cat(images) if images else None, rows, problems)


__all__ = ["Batch", "DatasetSplit", "Files", "Source", "find_source", "images_below", "open_image", "prepared"]
