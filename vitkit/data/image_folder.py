"""A folder of pictures, a folder a class, into the dataset store."""

import hashlib
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitkit.data.store import store_path, write_store
from vitkit.errors import DatasetError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Picture:
    """A picture file, the class it shows and the split it belongs to."""

    split: str
    label: str
    path: Path


def import_folder(
    root: str | Path, name: str, *, img_size: int = 64, test_fraction: float = 0.2, **metadata: str
) -> list[str]:
    """Write a folder of pictures into the store as dataset `name`, and return a line for whatever was left out.

    Each picture is turned upright by its EXIF data, laid on white where it is transparent, made RGB, and cropped to the
    square in its middle, resized to `img_size`. The lines are kept in the store too, as `skipped`. Raises
    `UsageError` for arguments out of range, and `DatasetError` where `pictures_of` does, where fewer than two classes
    have a readable picture to train on and where the store cannot be written.
    """
    if img_size < 1:
        raise UsageError(f"img_size is {img_size}; expected at least 1 pixel")
    store_path(name)  # a bad name is refused before any work
    folder = Path(root).expanduser()
    pictures, skipped = pictures_of(folder, test_fraction)
    pixels = torch.empty(len(pictures), 3, img_size, img_size, dtype=torch.uint8)
    read: list[int] = []
    for index, problem in enumerate(_read_all(pictures, pixels)):
        if problem:
            skipped.append(f"{pictures[index].path}: {problem}")
        else:
            read.append(index)
    classes = sorted({pictures[index].label for index in read if pictures[index].split == "train"})
    for label in sorted({picture.label for picture in pictures} - set(classes)):
        skipped.append(f"class {label!r}: no readable picture of it to train on")
    if len(classes) < 2:
        raise DatasetError(
            f"{folder} has pictures to train on of {len(classes)} classes, expected at least two; "
            f"left out: {'; '.join(skipped[:3])}"
        )
    tensors = {}
    for split in ("train", "test"):
        own = [i for i in read if pictures[i].split == split and pictures[i].label in classes]
        tensors[f"{split}.images"] = pixels[own]
        tensors[f"{split}.labels"] = torch.tensor([classes.index(pictures[i].label) for i in own], dtype=torch.int64)
    write_store(name, tensors, classes, skipped=skipped, **metadata)
    return skipped


def pictures_of(root: Path, test_fraction: float) -> tuple[list[Picture], list[str]]:
    """Every picture below `root`, and a line for each class folder that holds none.

    `root` holds a folder a class, or a folder `train`, and `test` or `val`, that do. Where there is no folder for
    testing, `test_fraction` of each class, at least one of two pictures, is for that: those whose names' hashes come
    first, so that adding pictures hardly moves others from one split into the other. Raises `UsageError` for a
    fraction outside [0, 1), and `DatasetError` where there is no such folder or fewer than two classes.
    """
    if not 0.0 <= test_fraction < 1.0:
        raise UsageError(f"test_fraction is {test_fraction}; expected a share in [0, 1)")
    if not root.is_dir():
        raise DatasetError(f"no folder at {root}; expected one that holds a folder of pictures for each class")
    divided = (root / "train").is_dir() and bool(_folders(root / "train"))
    test = next((root / name for name in TEST_FOLDERS if divided and (root / name).is_dir()), None)
    found: list[Picture] = []
    empty: list[str] = []
    for base in [root / "train" if divided else root, *([test] if test else [])]:
        for folder in _folders(base):
            paths = sorted(path for path in folder.rglob("*") if _is_picture(path))
            if not paths:
                empty.append(f"{folder}: no {', '.join(SUFFIXES)} file")
            if test:
                found += [Picture("test" if base == test else "train", folder.name, path) for path in paths]
                continue
            count = min(max(round(len(paths) * test_fraction), int(test_fraction > 0)), len(paths) - 1)
            paths.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
            found += [Picture("test" if i < count else "train", folder.name, path) for i, path in enumerate(paths)]
    classes = sorted({picture.label for picture in found})
    if len(classes) < 2:
        raise DatasetError(
            f"{root} should hold a folder for each of at least two classes, with {', '.join(SUFFIXES)} files in them; "
            f"found {f'only {classes[0]!r}' if classes else 'none'}"
        )
    return found, empty


def _folders(base: Path) -> list[Path]:
    return sorted(path for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_all(pictures: list[Picture], pixels: Tensor) -> Iterable[str]:
    """Fill `pixels` `(n 3 s s)`; what is wrong with each picture, or an empty string, in their order."""

    def read(index: int) -> str:
        try:
            pixels[index] = read_square(pictures[index].path, pixels.shape[-1])
        except Exception as error:  # Pillow's plugins raise many kinds for damaged files
            return f"{type(error).__name__}: {error}"
        return ""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata; what cannot be read is an error
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # an enormous picture is named, not loaded
        with ThreadPoolExecutor() as pool:  # Pillow lets other threads run while it decodes
            yield from pool.map(read, range(len(pictures)))


def read_square(file: Path | BinaryIO, size: int, channels: int = 3) -> Tensor:
    """A picture as uint8 `(channels size size)`, RGB or grey, prepared as `import_folder` says; Pillow's errors."""
    with Image.open(file) as opened:
        # A JPEG is decoded at a fraction of its size where that is enough.
        opened.draft("RGB" if channels == 3 else "L", (2 * size, 2 * size))
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):  # convert("RGB") would cut 16 bits to white
            picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        side = min(picture.size)
        left, top = ((length - side) / 2 for length in picture.size)
        middle = (left, top, left + side, top + side)
        picture = picture.convert("RGB" if channels == 3 else "L")
        square = picture.resize((size, size), Image.Resampling.BICUBIC, box=middle, reducing_gap=3.0)
    return torch.from_numpy(np.array(square)).view(size, size, channels).permute(2, 0, 1)
