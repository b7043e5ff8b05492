"""The dataset store: one memory-mapped safetensors file for each dataset.

`$VITKIT_DATA/<name>.safetensors` (default: the platform's cache directory) holds `train.images` uint8 `(n c h w)`,
`train.labels` int64 `(n,)`, `test.images`, `test.labels`, optionally `val.images` and `val.labels`, and the metadata `name` and
`classes`, a JSON list. Labels index `classes`; images without a label have −1, and a dataset without labels has no classes.

Files are written here in pieces, because the writer of safetensors copies every tensor into memory first.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeGuard

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitkit.contracts import UNLABELLED
from vitkit.errors import DatasetError, RunError, UsageError, printable
from vitkit.files import atomic_write, safetensors_header

SPLITS = ("train", "val", "test")
PIECE_BYTES = 1 << 20
LINES_KEPT = 1000
"""Most lines on left-out images that a store file keeps."""


@dataclass(frozen=True)
class StoredSplit:
    """`images` uint8 `(n c h w)`, on disk until they are used, and `labels` int64 `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PixelFile:
    """A tensor uint8 `(n c h w)` that stays on disk: the images `rows` of an open file of images of `image_shape` `(c h w)`."""

    file: BinaryIO
    rows: Sequence[int]
    image_shape: tuple[int, int, int]
    dtype = torch.uint8
    ndim = 4

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.image_shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self) -> Iterator[bytes]:
        size = math.prod(self.image_shape)
        for row in self.rows:
            self.file.seek(row * size)
            yield self.file.read(size)


@dataclass(frozen=True)
class Stored:
    """The content of a store file: the tensors by their names in the file, and the class names.

    `skipped` has a line for each image that was left out, `metadata` the other entries of the file.
    """

    name: str
    classes: list[str]
    tensors: Mapping[str, Tensor]
    skipped: list[str] = field(default_factory=list)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def train(self) -> StoredSplit:
        return self._split("train")

    @property
    def val(self) -> StoredSplit | None:
        """The validation split, where the file has one."""
        return self._split("val") if "val.images" in self.tensors else None

    @property
    def test(self) -> StoredSplit:
        return self._split("test")

    def _split(self, name: str) -> StoredSplit:
        return StoredSplit(self.tensors[f"{name}.images"], self.tensors[f"{name}.labels"])


def store_directory() -> Path:
    """The directory of the datasets: `$VITKIT_DATA`, or `vitkit/data` in the platform's cache directory."""
    folder = os.environ.get("VITKIT_DATA")
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("vitkit") / "data"


def store_path(name: str) -> Path:
    """The store file of a dataset; `UsageError` for a name that could lead out of the store."""
    if not re.fullmatch(r"[^\W_][\w.-]*", name) or ".." in name:
        raise UsageError(
            f"a dataset's name begins with a letter or digit, followed by letters, digits, '_', '-' and '.'; given {printable(name)!r}"
        )
    return store_directory() / f"{name}.safetensors"


def stored_names() -> list[str]:
    """The names of the datasets in the store, readable or not."""
    folder = store_directory()
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [path.stem for path in paths if not path.name.startswith(".")]


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Make the folder of a store file; an `OSError` in the block becomes a `DatasetError` that says what to do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None


@contextmanager
def store_lock(name: str) -> Iterator[None]:
    """A lock that is held while a dataset is made, so that only one rank of a job downloads it.

    Raises `DatasetError` if the store is not writable.
    """
    path = store_path(name)
    with writing_to(path):
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_store(path: str | Path) -> Stored:
    """Map a store file into memory and check everything but the pixels, which stay unread until a batch needs them.

    Raises `DatasetError` if it is missing, not readable, cut short or no store file, has other types or shapes, or labels outside
    its classes.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"there is no dataset file at {path}; `vitkit data list` lists the stored datasets")
    advice = f"delete it and make it again with `vitkit data get {path.stem}` (or `vitkit data import`)"
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        classes = json.loads(metadata.get("classes", "null"))
        skipped = json.loads(metadata.get("skipped", "[]"))
    except OSError as error:
        raise DatasetError(f"{path} is not readable: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is cut short or no store file ({error}); {advice}") from None
    problem = _problem(tensors, classes)
    if not problem and not _is_names(skipped):
        problem = "its metadata 'skipped' should be a JSON list of lines"
    if problem:
        raise DatasetError(f"{path}: {problem}; {advice}")
    return Stored(metadata.get("name", path.stem), classes, tensors, skipped, metadata)


def write_store(
    name: str, tensors: Mapping[str, Tensor | PixelFile], classes: list[str], *, skipped: Sequence[str] = (), **metadata: str
) -> Path:
    """Write a dataset into the store in one step: a failure leaves an earlier file as it was.

    Raises `DatasetError` for tensors that `read_store` would refuse, and if the file is not writable.
    """
    path = store_path(name)
    problem = _problem(tensors, classes)
    if problem:
        raise DatasetError(f"dataset {name!r} cannot be stored: {problem}")
    kept = list(skipped[:LINES_KEPT])
    if len(skipped) > LINES_KEPT:
        kept.append(f"and {len(skipped) - LINES_KEPT:,} more")
    lists = {"classes": classes, "skipped": kept} if kept else {"classes": classes}
    entries = {"name": name, **metadata} | {key: json.dumps(value, ensure_ascii=False) for key, value in lists.items()}
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            _write_safetensors(file, tensors, entries)
    except RunError as error:
        cause = error.__cause__
        raise _unwritable(path, cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)) from None
    return path


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor | PixelFile], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the tensors in pieces."""
    # Labels come first: their 8-byte numbers have to be aligned, and pixels may end anywhere.
    ordered = sorted(tensors.items(), key=lambda item: (item[1].dtype == torch.uint8, item[0]))
    entries = ((name, "U8" if tensor.dtype == torch.uint8 else "I64", tensor.shape, tensor.nbytes) for name, tensor in ordered)
    file.write(safetensors_header(entries, metadata))
    for _, tensor in ordered:
        if isinstance(tensor, PixelFile):
            file.writelines(tensor.pieces())
        elif tensor.numel():
            for piece in tensor.split(max(1, PIECE_BYTES // max(1, tensor[0].nbytes))):
                file.write(memoryview(piece.contiguous().numpy()).cast("B"))


def _unwritable(path: Path, reason: str) -> DatasetError:
    return DatasetError(
        f"cannot write {path}: {reason}; free some room there, or set the environment variable VITKIT_DATA to another "
        f"directory; no incomplete file was left"
    )


def _is_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _problem(tensors: Mapping[str, Tensor | PixelFile], classes: object) -> str:
    """The problem with a dataset's content, or an empty string."""
    splits = [split for split in SPLITS if split != "val" or f"{split}.images" in tensors or f"{split}.labels" in tensors]
    missing = [f"{split}.{part}" for split in splits for part in ("images", "labels") if f"{split}.{part}" not in tensors]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if not _is_names(classes):
        return "it names no classes: its metadata 'classes' should be a JSON list of names"
    sizes = tensors["train.images"].shape[1:]
    for split in splits:
        images, labels = tensors[f"{split}.images"], tensors[f"{split}.labels"]
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
            return f"{split}.images is {images.dtype} {tuple(images.shape)}, expected uint8 (n, c, h, w)"
        if images.shape[1:] != sizes:
            return f"{split}.images is {tuple(images.shape)}, expected (n, {', '.join(map(str, sizes))}) as in train"
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or tuple(labels.shape) != tuple(images.shape[:1]):
            return f"{split}.labels is {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},)"
        if len(labels) and not UNLABELLED <= int(labels.min()) <= int(labels.max()) < len(classes):
            if not classes:
                return "it names no classes: its metadata 'classes' should be a JSON list of names"
            return (
                f"{split}.labels run from {int(labels.min())} to {int(labels.max())}, "
                f"expected 0 to {len(classes) - 1} for its {len(classes)} classes, or {UNLABELLED} without a label"
            )
    return "" if len(tensors["train.labels"]) else "it holds no training images"


__all__ = [
    "PixelFile", "Stored", "StoredSplit", "read_store", "store_directory", "store_lock", "store_path", "stored_names", "write_store",
    "writing_to",
]  # fmt: skip
