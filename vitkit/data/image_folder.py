"""Import of a folder of images into the dataset store: class folders, split folders, or images without labels."""

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from vitkit.contracts import UNLABELLED
from vitkit.data.decode import SUFFIXES, ImageReadError, read_square
from vitkit.data.image_files import class_folders, class_order, list_images
from vitkit.data.store import PixelFile, store_path, write_store, writing_to
from vitkit.errors import DatasetError, printable
from vitkit.validation import at_least, in_range

SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of folders that hold a split, in lower case; upper and lower case are not distinguished."""
DECODED_AHEAD = 64
"""Images that are being decoded while earlier ones are written."""


@dataclass(frozen=True)
class ImageFile:
    """An image file, the split that it belongs to, and its class, or None if it has no label."""

    split: str
    label: str | None
    path: Path


@dataclass
class Layout:
    """The layout of a folder: its image files, lines for images that are left out, and remarks on other files."""

    files: list[ImageFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    divided: bool = False
    """True if test images were taken from the training images."""

    @property
    def labelled(self) -> bool:
        return any(file.label is not None for file in self.files)


def import_folder(
    root: str | Path, name: str, *, img_size: int = 64, test_fraction: float = 0.2, unlabelled: bool = False, **metadata: str
) -> list[str]:
    """Write a folder of images into the store as dataset `name`, and return a line for each image that was left out.

    `read_layout` describes the layouts. The middle square of each image is resized to `img_size`. The lines are kept in the
    store as `skipped`, and remarks on the layout as `layout`. Images are written as they are decoded: memory does not grow with their
    number. Raises `UsageError` for arguments out of range, and `DatasetError` if `read_layout` does, if fewer than two classes
    have a readable image to train on, if a split has no readable image, and if the store is not writable.
    """
    at_least(1, img_size=img_size)
    path = store_path(name)  # a bad name is refused before any work
    folder = Path(root).expanduser()
    layout = read_layout(folder, test_fraction, unlabelled=unlabelled)
    skipped = list(layout.left_out)
    with writing_to(path), tempfile.TemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".partial") as pixels:
        readable = list(_decode_into(pixels, layout.files, img_size, skipped))
        rows = {file.path: row for row, file in enumerate(readable)}
        if layout.divided:  # test images are chosen among the readable ones, so that a split is not empty if it need not be
            readable = [replace(file, split="train") if file.split == "test" else file for file in readable]
            readable = _with_test(readable, test_fraction)
        classes = sorted({file.label for file in readable if file.split == "train" and file.label is not None}, key=class_order)
        skipped += _foreign_classes(layout.files, classes)
        splits = {
            split: [file for file in readable if file.split == split and (file.label is None or file.label in classes)]
            for split in ("train", "val", "test")
        }
        _require_images(folder, layout, splits, classes, skipped)
        tensors: dict[str, Tensor | PixelFile] = {}
        for split, files in splits.items():
            if files or split != "val":
                tensors[f"{split}.images"] = PixelFile(pixels, [rows[file.path] for file in files], (3, img_size, img_size))
                labels = [UNLABELLED if file.label is None else classes.index(file.label) for file in files]
                tensors[f"{split}.labels"] = torch.tensor(labels, dtype=torch.int64)
        remarks = "\n".join(layout.remarks)
        write_store(name, tensors, list(map(printable, classes)), skipped=skipped, layout=remarks, **metadata)
    return skipped


def read_layout(root: Path, test_fraction: float, *, unlabelled: bool = False) -> Layout:
    """Every image below `root` with its split and class.

    - Folders called train, val and test, or as in `SPLIT_FOLDERS`, each with a folder for each class: these splits. A val or test folder
      without class folders is left out, since nothing can be measured on it.
    - These folders with images directly in them: these splits, without labels.
    - A folder for each class: every image below it has this class, for any name of the folder; a class may be called `train`.
    - Images directly in `root`, and at most one folder: images without labels. With `unlabelled` all layouts are read like this.

    Without a test folder `test_fraction` of the training images of each class, at least one of two, are for testing: those whose
    names have the smallest hashes, so that adding an image moves few others between the splits. Raises `UsageError` for a
    fraction outside [0, 1), and `DatasetError` if there is no folder, no image, only one class, or a split's folder without images.
    """
    in_range(0, 1, high_included=False, test_fraction=test_fraction)
    if not root.is_dir():
        raise DatasetError(f"there is no folder at {printable(root)}; expected one with images in it, or with a folder for each class")
    listing = list_images(root)
    layout = Layout(left_out=listing.left_out, remarks=[f"skipped: {line}" for line in listing.remarks])
    if not listing.images:
        raise DatasetError(f"{printable(root)} holds no image; expected {', '.join(SUFFIXES)} files in it or below it")
    groups = _top_folders(root, listing.images)
    roles = _split_folders(root, groups)
    for name, role in roles.items():
        if name not in groups:
            raise DatasetError(f"{printable(root / name)} is the folder of the {role} split and holds no image; fill it or remove it")
    if roles:
        _read_splits(root, groups, roles, layout, unlabelled)
    elif unlabelled or (groups.get("") and len(groups) <= 2):
        layout.files = [ImageFile("train", None, path) for path in listing.images]
        layout.remarks.insert(0, f"images without labels: {len(listing.images):,}")
    else:
        _read_classes(root, groups, layout)
    if all(file.split != "test" for file in layout.files):
        layout.files, layout.divided = _with_test(layout.files, test_fraction), True
        of_each = " of each class" if layout.labelled else ""
        layout.remarks.append(f"test: {test_fraction:.0%} of the training images{of_each}, by their names")
    return layout


def folder_labels(root: Path, paths: Sequence[Path]) -> list[str]:
    """The class that each image below `root` has by its folder, as `read_layout` sees it, or an empty string."""
    roles = _split_folders(root, _top_folders(root, paths))
    labels = []
    for path in paths:
        folders = path.relative_to(root).parts[:-1]
        folders = folders[1:] if folders and folders[0] in roles else folders
        labels.append(folders[0] if folders else "")
    return labels


def _top_folders(root: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Image files by the folder in `root` that they lie in, an empty string for `root` itself."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        parts = path.relative_to(root).parts
        groups.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    return groups


def _split_folders(root: Path, groups: dict[str, list[Path]]) -> dict[str, str]:
    """The split of each folder that holds one, or nothing where the folders are classes or `root` has none of that kind."""
    roles = {path.name: SPLIT_FOLDERS[path.name.lower()] for path in class_folders(root) if path.name.lower() in SPLIT_FOLDERS}
    trained = [name for name, role in roles.items() if role == "train" and name in groups]
    inner = {path.relative_to(root).parts[1] for name in trained for path in groups[name] if len(path.relative_to(root).parts) > 2}
    others = [name for name in groups if name and name not in roles]
    if not trained or (others and len(inner) < 2):  # `train` is then one of the classes
        return {}
    return roles


def _read_splits(root: Path, groups: dict[str, list[Path]], roles: dict[str, str], layout: Layout, unlabelled: bool) -> None:
    def label(path: Path) -> str | None:
        parts = path.relative_to(root).parts
        return parts[1] if len(parts) > 2 else None

    labelled = not unlabelled and any(label(path) is not None for name in groups if roles.get(name) == "train" for path in groups[name])
    for name, paths in sorted(groups.items()):
        folder = printable(root / name)
        role = roles.get(name)
        if role is None:
            where = f"{folder}: {len(paths):,} images {'beside' if not name else 'in a folder other than'} train, val and test"
            layout.left_out.append(where)
            continue
        files = [ImageFile(role, label(path) if labelled else None, path) for path in paths]
        kept = [file for file in files if not labelled or file.label is not None]
        if len(kept) < len(files):
            layout.left_out.append(
                f"{folder}: {len(files) - len(kept):,} images without a class folder have no label; `vitkit predict` can label them"
            )
        if labelled:
            layout.left_out += _empty_classes(root / name, paths)
        layout.files += kept
        if kept:
            layout.remarks.append(f"{role}: {len(kept):,} images in {folder}{'' if labelled else ', without labels'}")
    if labelled and len({file.label for file in layout.files}) < 2:
        raise DatasetError(_too_few_classes(root, layout))


def _read_classes(root: Path, groups: dict[str, list[Path]], layout: Layout) -> None:
    if loose := groups.pop("", []):
        layout.left_out.append(f"{printable(root)}: {len(loose):,} images beside the class folders have no label")
    layout.left_out += [f"{printable(path)}: no {', '.join(SUFFIXES)} file" for path in class_folders(root) if path.name not in groups]
    layout.files = [ImageFile("train", name, path) for name in sorted(groups, key=class_order) for path in groups[name]]
    if len(groups) < 2:
        raise DatasetError(_too_few_classes(root, layout))
    layout.remarks.insert(0, f"classes: the {len(groups):,} folders in {printable(root)}")


def _too_few_classes(root: Path, layout: Layout) -> str:
    names = sorted({file.label for file in layout.files if file.label is not None})
    only = f"only {printable(names[0])!r}" if names else "none"
    return (
        f"{printable(root)} should hold a folder for each of at least two classes, with {', '.join(SUFFIXES)} files in them; there is "
        f"{only}; images without labels are imported with --unlabelled"
    )


def _empty_classes(base: Path, paths: Sequence[Path]) -> list[str]:
    filled = {path.relative_to(base).parts[0] for path in paths}
    return [f"{printable(path)}: no {', '.join(SUFFIXES)} file" for path in class_folders(base) if path.name not in filled]


def _with_test(files: list[ImageFile], fraction: float) -> list[ImageFile]:
    """The same files, with a share of the training images of each class, or of all without labels, for testing."""
    groups: dict[str | None, list[ImageFile]] = {}
    for file in files:
        groups.setdefault(file.label if file.split == "train" else "", []).append(file)
    divided = groups.pop("", [])  # no class folder has an empty name
    for group in groups.values():
        count = min(max(round(len(group) * fraction), int(fraction > 0)), len(group) - 1)
        group.sort(key=lambda file: hashlib.sha256(os.fsencode(file.path.name)).digest())
        divided += [replace(file, split="test") if place < count else file for place, file in enumerate(group)]
    return divided


def _decode_into(pixels: BinaryIO, files: Sequence[ImageFile], img_size: int, skipped: list[str]) -> Iterator[ImageFile]:
    """Append the pixels of each readable image, in order, and yield its file; the others get a line in `skipped`."""
    waiting: deque[tuple[ImageFile, Future[Tensor]]] = deque()

    def finish() -> Iterator[ImageFile]:
        file, future = waiting.popleft()
        try:
            pixels.write(future.result().numpy().tobytes())
            yield file
        except ImageReadError as error:
            skipped.append(f"{printable(file.path)}: {printable(error)}")

    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        for file in files:
            waiting.append((file, pool.submit(read_square, file.path, img_size)))
            if len(waiting) > DECODED_AHEAD:
                yield from finish()
        while waiting:
            yield from finish()


def _foreign_classes(files: Sequence[ImageFile], classes: Sequence[str]) -> list[str]:
    foreign = {file.label for file in files if file.label is not None} - set(classes)
    return [f"class {printable(label)!r}: no readable image of it to train on" for label in sorted(foreign, key=class_order)]


def _require_images(
    folder: Path, layout: Layout, splits: dict[str, list[ImageFile]], classes: Sequence[str], skipped: Sequence[str]
) -> None:
    reasons = f"; left out: {'; '.join(skipped[:3])}" if skipped else ""
    if layout.labelled and len(classes) < 2:
        raise DatasetError(f"{printable(folder)} has images to train on of {len(classes)} classes; expected at least two{reasons}")
    for split, files in splits.items():
        expected = split == "train" or any(file.split == split for file in layout.files)
        if not files and expected and not (layout.divided and split == "test"):
            raise DatasetError(f"{printable(folder)} has no readable image for the {split} split{reasons}")


__all__ = ["SPLIT_FOLDERS", "ImageFile", "Layout", "folder_labels", "import_folder", "read_layout"]
