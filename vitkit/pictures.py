"""A folder of pictures, a folder a class, into the dataset store."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitkit.errors import DatasetError, UsageError
from vitkit.store import store_path, write_store

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_FOLDERS = ("test", "val", "valid", "validation")


def import_folder(root: str | Path, name: str, *, img_size: int = 64, test_fraction: float = 0.2) -> list[str]:
    """Write a folder of pictures into the store as dataset `name`; a line for each picture that was left out."""
    if img_size < 1:
        raise UsageError(f"img_size is {img_size}; expected at least 1 pixel")
    store_path(name)  # a bad name is refused before any work
    folder = Path(root).expanduser()
    sources = sources_of(folder, test_fraction)
    classes = sorted({label for _, label, _ in sources})
    images: dict[str, list[Tensor]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    skipped = []
    for split, label, path in sources:
        try:
            picture = _read(path, img_size)
        except Exception as error:  # Pillow's plugins raise many kinds for damaged files
            skipped.append(f"{path}: {type(error).__name__}: {error}")
            continue
        images[split].append(picture)
        labels[split].append(classes.index(label))
    if not images["train"]:
        first = f" ({skipped[0]})" if skipped else ""
        raise DatasetError(f"no picture in {folder} could be read{first}; expected {', '.join(SUFFIXES)} files")
    tensors = {}
    for split in ("train", "test"):
        pixels = torch.stack(images[split]) if images[split] else torch.empty(0, 3, img_size, img_size, dtype=torch.uint8)
        tensors[f"{split}.images"] = pixels
        tensors[f"{split}.labels"] = torch.tensor(labels[split], dtype=torch.int64)
    write_store(name, tensors, classes)
    return skipped


def sources_of(root: Path, test_fraction: float) -> list[tuple[str, str, Path]]:
    """(split, class, file) of every picture."""
    if not root.is_dir():
        raise DatasetError(f"no folder at {root}; expected one with a folder of pictures for each class")
    if not 0.0 <= test_fraction < 1.0:
        raise UsageError(f"test_fraction is {test_fraction}; expected a share in [0, 1)")
    given = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and given is not None:
        found = [("train", *item) for item in _pictures(root / "train")]
        found += [("test", *item) for item in _pictures(given)]
    else:
        found = []
        pictures = _pictures(root)
        for label in sorted({label for label, _ in pictures}):
            # By the hash of their names, so that adding a picture moves no other one between the splits.
            paths = sorted((path for name, path in pictures if name == label), key=_hash_of_name)
            count = round(len(paths) * test_fraction)
            found += [("test" if index < count else "train", label, path) for index, path in enumerate(paths)]
    classes = {label for _, label, _ in found}
    if len(classes) < 2:
        have = f"only {classes.pop()!r}" if classes else "none"
        raise DatasetError(
            f"{root} should hold a folder for each of at least two classes, with {', '.join(SUFFIXES)} files in them; "
            f"found {have}"
        )
    return found


def _pictures(folder: Path) -> list[tuple[str, Path]]:
    return [
        (sub.name, path)
        for sub in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in sorted(sub.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]


def _hash_of_name(path: Path) -> str:
    return hashlib.sha256(path.name.encode()).hexdigest()


def _read(path: Path, img_size: int) -> Tensor:
    """A picture as uint8 `(3 s s)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # an enormous picture is named, not loaded
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):  # 16 bits and more: convert("RGB") would clip them to white
                values = np.asarray(picture, dtype=np.float64)
                picture = Image.fromarray((values / max(values.max(), 1) * 255).astype(np.uint8))
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                rgba = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            picture = ImageOps.fit(picture.convert("RGB"), (img_size, img_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
