"""What a trained model is given to look at: pictures of a person's own, or a dataset's split."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vitkit.data.image_folder import SUFFIXES, TEST_FOLDERS
from vitkit.errors import DatasetError, UsageError

SPLIT_FOLDERS = ("train", *TEST_FOLDERS)
FINGERPRINTED = 1000
"""Images of a dataset that its fingerprint is taken of."""


class Preprocessed(Protocol):
    """What reading needs of a model."""

    def preprocess(self, images: Any) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Images `start` … `stop` − 1 of a source: `images` float32 `(m c h w)` of `rows`, and why each other is left out."""

    start: int
    stop: int
    images: Tensor | None
    rows: list[int]
    problems: dict[int, str]


class Source(Protocol):
    """Images in a fixed order. `labels` int64 `(n,)` index `classes`, where they are known."""

    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...

    def batches(self, model: Preprocessed, starts: Sequence[int], size: int) -> Iterator[Batch]: ...


class Files:
    """Picture files, decoded by threads while the model computes.

    Where each lies in a folder below `root`, the uppermost one, or the one below `train`, `test` or `val`, names its
    class; `classes` are these names in alphabetical order.
    """

    def __init__(self, paths: Sequence[Path], root: Path | None = None) -> None:
        self.paths = list(paths)
        folders = [_class_folder(path, root) for path in self.paths]
        self.classes: list[str] = sorted({folder for folder in folders if folder})
        self.labels: Tensor | None = None
        if len(self.classes) > 1 and all(folders):
            self.labels = torch.tensor([self.classes.index(folder) for folder in folders], dtype=torch.int64)
        else:
            self.classes = []

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def describe(self) -> dict[str, Any]:
        """What an output's metadata says of the source, besides its files."""
        return {"classes": self.classes}

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or changed."""
        stats = [path.stat() if path.exists() else None for path in self.paths]
        found = [(str(path), s and (s.st_mtime_ns, s.st_size)) for path, s in zip(self.paths, stats, strict=True)]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def batches(self, model: Preprocessed, starts: Sequence[int], size: int) -> Iterator[Batch]:
        """Batches of `size` images from each of `starts` on; a picture that cannot be read is among its problems."""

        def ask(start: int) -> list[Future[Tensor | str]]:
            return [pool.submit(_prepared, model, path) for path in self.paths[start : start + size]]

        with _strict_about_bombs(), ThreadPoolExecutor() as pool:
            waiting: list[Future[Tensor | str]] = []
            try:
                for place, start in enumerate(starts):
                    current = waiting if place else ask(start)
                    waiting = ask(starts[place + 1]) if place + 1 < len(starts) else []
                    yield _collected(start, [future.result() for future in current])
            finally:
                for future in waiting:
                    future.cancel()


class DatasetSplit:
    """One split of a dataset: its stored pixels, made into what the model sees."""

    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset, self.split = dataset, split
        self.images: Tensor = getattr(dataset, split).images
        self.labels: Tensor | None = getattr(dataset, split).labels
        self.classes: list[str] = list(dataset.classes)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.dataset.name}/{self.split}/{index}"

    def describe(self) -> dict[str, Any]:
        """What an output's metadata says of the source."""
        return {"dataset": self.dataset.name, "split": self.split, "classes": self.classes}

    def fingerprint(self) -> str:
        """Of the name, the labels and about a thousand of the images."""
        digest = hashlib.sha256(repr((self.dataset.name, self.split, tuple(self.images.shape))).encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        digest.update(self.images[:: len(self) // FINGERPRINTED + 1].numpy().tobytes())
        return digest.hexdigest()

    def batches(self, model: Preprocessed, starts: Sequence[int], size: int) -> Iterator[Batch]:
        """Batches of `size` images from each of `starts` on."""
        for start in starts:
            stop = min(start + size, len(self))
            yield Batch(start, stop, model.preprocess(self.images[start:stop]), list(range(start, stop)), {})


def prepared(model: Preprocessed, images: Any, batch_size: int) -> Iterator[Tensor]:
    """Batches of preprocessed images of a folder, picture files, Pillow images or uint8 `(n c h w)`.

    Raises `UsageError` for something else and for a picture that cannot be read.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; expected at least 1")
    if isinstance(images, str | Path):
        path = Path(images).expanduser()
        images = pictures_below(path) if path.is_dir() else [path]
    if not isinstance(images, Tensor | Sequence) or len(images) == 0:
        raise UsageError(f"images are {images!r:.80}; expected a folder, picture files, Pillow images or a uint8 tensor")
    for start in range(0, len(images), batch_size):
        some = images[start : start + batch_size]
        if not isinstance(some, Tensor):
            some = [read_picture(one) if isinstance(one, str | Path) else one for one in some]
        yield model.preprocess(some)


def find_source(images: Sequence[str], *, split: str = "test") -> Source:
    """The source that words on a command line mean: one folder, one dataset's name, or files and folders.

    Raises `UsageError` for no word, a file that is not there and a split that is none; `DatasetError` for a folder
    without pictures and where the dataset cannot be had.
    """
    if split not in ("train", "test"):
        raise UsageError(f"--split {split}: expected train or test")
    if not images:
        raise UsageError("which images? give a folder, a dataset's name, or picture files")
    if not all(word.strip() for word in images):
        raise UsageError("an argument for the images is empty, perhaps an unset variable; give a folder, a dataset's name, or files")
    if len(images) == 1 and not Path(images[0]).expanduser().exists() and Path(images[0]).suffix.lower() not in SUFFIXES:
        return DatasetSplit(_dataset(images[0]), split)
    root = Path(images[0]).expanduser() if len(images) == 1 else None
    paths: list[Path] = []
    for word in images:
        path = Path(word).expanduser()
        if path.is_dir():
            paths += pictures_below(path)
        elif path.is_file():
            paths.append(path)
        else:
            raise UsageError(f"no picture at {path}; give files and folders that are there, or one dataset's name")
    return Files(paths, root if root is not None and root.is_dir() else None)


def pictures_below(folder: Path) -> list[Path]:
    """Every picture in a folder and below it, in alphabetical order; `DatasetError` where there is none."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _is_hidden(path.relative_to(folder))
    )
    if not found:
        raise DatasetError(f"{folder} holds no picture: expected {', '.join(SUFFIXES)} files in it or below it")
    return found


def read_picture(path: str | Path) -> Image.Image:
    """A picture file, decoded; `UsageError` that says what is wrong with it."""
    try:
        with _strict_about_bombs(), Image.open(path) as opened:
            opened.load()
            return opened
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        raise UsageError(f"{path} cannot be read as a picture: {_said(error)}") from None


def _dataset(name: str) -> Any:
    from vitkit import data

    try:
        return data.build(name)
    except UsageError as error:
        raise UsageError(f"{name!r} is neither a file, a folder nor a dataset: {error}") from None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _class_folder(path: Path, root: Path | None) -> str:
    folders = path.relative_to(root).parts[:-1] if root is not None else ()
    if folders and folders[0] in SPLIT_FOLDERS:
        folders = folders[1:]
    return folders[0] if folders else ""


def _prepared(model: Preprocessed, path: Path) -> Tensor | str:
    """A picture as the model sees it `(1 c h w)`, or what is wrong with it."""
    try:
        with Image.open(path) as opened:
            return model.preprocess([opened])
    except UsageError:  # a model that takes no pictures takes none of them
        raise
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        return _said(error)


def _collected(start: int, found: Sequence[Tensor | str]) -> Batch:
    images = [one for one in found if isinstance(one, Tensor)]
    rows = [start + place for place, one in enumerate(found) if isinstance(one, Tensor)]
    problems = {start + place: one for place, one in enumerate(found) if isinstance(one, str)}
    return Batch(start, start + len(found), torch.cat(images) if images else None, rows, problems)


@contextmanager
def _strict_about_bombs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata; what cannot be read is an error
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # an enormous picture is named, not loaded
        yield


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


__all__ = ["Batch", "DatasetSplit", "Files", "Source", "find_source", "pictures_below", "prepared", "read_picture"]
