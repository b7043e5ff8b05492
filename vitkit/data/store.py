"""The dataset store: one memory-mapped safetensors file a dataset.

`$VITKIT_DATA/<name>.safetensors` (default: the platform's cache directory) holds `train.images` uint8 `(n c h w)`,
`train.labels` int64 `(n,)`, `test.images`, `test.labels`, and the metadata `name` and `classes`, a JSON list.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from vitkit.errors import DatasetError, RunError, UsageError
from vitkit.files import atomic_write

SPLITS = ("train", "test")


@dataclass(frozen=True)
class StoredSplit:
    """`images` uint8 `(n c h w)` and `labels` int64 `(n,)`, both on disk until they are looked at."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Stored:
    """A store file's content: the tensors by their names in the file, and the class names.

    `skipped` has a line for each picture that was left out, `metadata` what else its maker wrote.
    """

    name: str
    classes: list[str]
    tensors: Mapping[str, Tensor]
    skipped: list[str] = field(default_factory=list)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def train(self) -> StoredSplit:
        return StoredSplit(self.tensors["train.images"], self.tensors["train.labels"])

    @property
    def test(self) -> StoredSplit:
        return StoredSplit(self.tensors["test.images"], self.tensors["test.labels"])


def store_directory() -> Path:
    """Where datasets are kept: `$VITKIT_DATA`, or `vitkit/data` in the platform's cache directory."""
    given = os.environ.get("VITKIT_DATA")
    return Path(given).expanduser() if given else platformdirs.user_cache_path("vitkit") / "data"


def store_path(name: str) -> Path:
    """The store file of a dataset; `UsageError` for a name that could lead out of the store."""
    if not re.fullmatch(r"[^\W_][\w.-]*", name) or ".." in name:
        raise UsageError(
            f"a dataset's name begins with a letter or digit and goes on with letters, digits, '_', '-' and '.'; "
            f"given {name!r}"
        )
    return store_directory() / f"{name}.safetensors"


def stored_names() -> list[str]:
    """The names of the datasets in the store, readable or not."""
    folder = store_directory()
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [path.stem for path in found if not path.name.startswith(".")]


@contextmanager
def store_lock(name: str) -> Iterator[None]:
    """Held while a dataset is made, so that the ranks of one job do not all download it.

    Raises `DatasetError` where the store cannot be written to.
    """
    path = store_path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None
    try:
        yield
    finally:
        lock.release()


def read_store(path: str | Path) -> Stored:
    """Map a store file into memory and check what is cheap to check; images stay unread until a batch takes them.

    Raises `DatasetError` where it is missing, cannot be read, is cut short or no store file, is of other types or
    shapes, or holds labels outside its classes.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"no dataset file at {path}; `vitkit data list` shows what there is")
    way = f"delete it and make it again with `vitkit data get {path.stem}` (or `vitkit data import`)"
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        classes = json.loads(metadata.get("classes", "null"))
        skipped = json.loads(metadata.get("skipped", "[]"))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is cut short or no store file ({error}); {way}") from None
    problem = _problem(tensors, classes)
    if not problem and not _is_names(skipped):
        problem = "its metadata 'skipped' should be a JSON list of lines"
    if problem:
        raise DatasetError(f"{path}: {problem}; {way}")
    return Stored(metadata.get("name", path.stem), classes, tensors, skipped, metadata)


def write_store(
    name: str, tensors: Mapping[str, Tensor], classes: list[str], *, skipped: Sequence[str] = (), **metadata: str
) -> Path:
    """Write a dataset into the store, whole or not at all.

    Raises `DatasetError` for tensors that `read_store` would refuse, and where the file cannot be written.
    """
    path = store_path(name)
    problem = _problem(tensors, classes)
    if problem:
        raise DatasetError(f"dataset {name!r} cannot be stored: {problem}")
    lists = {"classes": classes, "skipped": skipped} if skipped else {"classes": classes}
    everything = {"name": name, **metadata} | {
        key: json.dumps(value, ensure_ascii=False) for key, value in lists.items()
    }
    try:
        with atomic_write(path) as temporary:
            # The form for torch refuses tensors that share memory, such as two slices of one.
            arrays = {key: value.contiguous().numpy() for key, value in tensors.items()}
            save_file(arrays, temporary, metadata=everything)
    except (RunError, SafetensorError) as error:  # safetensors wraps what the operating system says
        cause = error.__cause__
        said = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
        raise _unwritable(path, said) from None
    return path


def _unwritable(path: Path, said: str) -> DatasetError:
    return DatasetError(
        f"cannot write {path}: {said}; free some room there, or let the environment variable VITKIT_DATA name another "
        f"directory; nothing was left half-written"
    )


def _is_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _problem(tensors: Mapping[str, Tensor], classes: object) -> str:
    """What is wrong with a dataset's content, or an empty string."""
    expected = [f"{split}.{part}" for split in SPLITS for part in ("images", "labels")]
    missing = [name for name in expected if name not in tensors]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if not classes or not _is_names(classes):
        return "it names no classes: its metadata 'classes' should be a JSON list of names"
    sizes = tensors["train.images"].shape[1:]
    for split in SPLITS:
        images, labels = tensors[f"{split}.images"], tensors[f"{split}.labels"]
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
            return f"{split}.images is {images.dtype} {tuple(images.shape)}, expected uint8 (n, c, h, w)"
        if images.shape[1:] != sizes:
            return f"{split}.images is {tuple(images.shape)}, expected (n, {', '.join(map(str, sizes))}) as in train"
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            return f"{split}.labels is {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},)"
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            return (
                f"{split}.labels run from {int(labels.min())} to {int(labels.max())}, "
                f"expected 0 to {len(classes) - 1} for its {len(classes)} classes"
            )
    return "" if len(tensors["train.labels"]) else "it holds no training images"
