"""The dataset store: one memory-mapped safetensors file a dataset.

`$VITKIT_DATA/<name>.safetensors` (default: the platform's cache directory) holds `train.images` uint8 `(n c h w)`,
`train.labels` int64 `(n,)`, `test.images`, `test.labels`, and the metadata `name` and `classes`, a JSON list.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitkit.errors import DatasetError, UsageError
from vitkit.files import atomic_write

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Stored:
    """A store file's content: tensors that stay on disk until they are looked at, and the class names."""

    name: str
    classes: list[str]
    tensors: dict[str, Tensor]


def store_directory() -> Path:
    """Where datasets are kept: `$VITKIT_DATA`, or the platform's cache directory."""
    return Path(os.environ.get("VITKIT_DATA") or platformdirs.user_cache_path("vitkit") / "data")


def store_path(name: str) -> Path:
    """The store file of a dataset; `UsageError` for a name that could lead out of the store."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or ".." in name:
        raise UsageError(f"a dataset's name is made of letters, digits, '_', '-' and '.'; given {name!r}")
    return store_directory() / f"{name}.safetensors"


def stored_names() -> list[str]:
    """The names of the datasets in the store, readable or not."""
    folder = store_directory()
    return sorted(path.stem for path in folder.glob("*.safetensors")) if folder.is_dir() else []


def read_store(path: str | Path) -> Stored:
    """Map a store file into memory and check what is cheap to check.

    Raises `DatasetError` where it is missing, cut short, no store file, of other types or shapes, or holds labels
    outside its classes.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"no dataset file at {path}; `vitkit data list` shows what there is")
    way = f"delete it and fetch it again with `vitkit data get {path.stem}`"
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        classes = json.loads(metadata.get("classes", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DatasetError(f"{path} is cut short or no store file ({error}); {way}") from None
    expected = {f"{split}.{part}" for split in SPLITS for part in ("images", "labels")}
    if not expected <= set(tensors):
        raise DatasetError(f"{path} lacks {', '.join(sorted(expected - set(tensors)))}; {way}")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise DatasetError(f"{path} names no classes: its metadata 'classes' should be a JSON list of names; {way}")
    for split in SPLITS:
        images, labels = tensors[f"{split}.images"], tensors[f"{split}.labels"]
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DatasetError(
                f"{path}: {split}.images is {images.dtype} {tuple(images.shape)}, expected uint8 (n, c, h, w); {way}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DatasetError(
                f"{path}: {split}.labels is {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},); {way}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise DatasetError(
                f"{path}: {split}.labels run from {int(labels.min())} to {int(labels.max())}, "
                f"expected 0 to {len(classes) - 1} for its {len(classes)} classes; {way}"
            )
    return Stored(metadata.get("name", path.stem), classes, tensors)


def write_store(name: str, tensors: Mapping[str, Tensor], classes: list[str]) -> Path:
    """Write a dataset into the store, whole or not at all; `RunError` where it cannot be written."""
    path = store_path(name)
    metadata = {"name": name, "classes": json.dumps(classes)}
    with atomic_write(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata=metadata)
    return path
