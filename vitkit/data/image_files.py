"""The image files in a folder, for import, embed, predict and search. Files that are left out are counted and reported.

Hidden files and folders, and folders that systems and notebooks create, are skipped. Linked folders are followed, unless the link
leads to a folder that contains it.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vitkit.data.decode import SUFFIXES
from vitkit.errors import printable

SYSTEM_FOLDERS = {"__macosx", "__pycache__", "@eadir", "@__thumb", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
"""Names in lower case; folders whose names begin with a dot are skipped, too."""
OTHER_IMAGES = {
    ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".eps", ".pdf", ".psd", ".ico", ".tga", ".ppm", ".pgm", ".pbm", ".dng", ".cr2",
    ".nef", ".arw", ".raw", ".exr", ".hdr", ".dcm", ".npy",
}  # fmt: skip
"""Endings of images in formats that are not read."""
NAMES_LISTED = 5


@dataclass
class ImageListing:
    """`images` below a folder, sorted; lines for images that are `left_out`, and `remarks` on all other files and folders."""

    images: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def list_images(folder: Path) -> ImageListing:
    """Every file in a folder and below it whose name ends with one of `SUFFIXES`."""
    listing = ImageListing()
    unread: Counter[str] = Counter()
    other: Counter[str] = Counter()
    hidden = 0
    folders: list[str] = []
    for path, kind in _walk(folder):
        suffix = path.suffix.lower()
        if kind == "file" and path.name.startswith("."):
            hidden += 1
        elif kind == "file" and suffix in SUFFIXES:
            listing.images.append(path)
        elif kind == "file":
            (unread if suffix in OTHER_IMAGES else other)[suffix or "no ending"] += 1
        elif kind == "skipped":
            folders.append(path.name)
        else:
            listing.left_out.append(f"{printable(path)}: {kind}")
    listing.images.sort()
    listing.left_out.sort()
    if unread:
        listing.left_out.append(f"{_counted(unread)} in formats that are not read; convert them to JPEG or PNG")
    if other:
        listing.remarks.append(f"{_counted(other)} that are not images")
    if hidden:
        listing.remarks.append(f"{_plural(hidden, 'hidden file')}")
    if folders:
        names = ", ".join(map(printable, sorted(set(folders))[:NAMES_LISTED]))
        listing.remarks.append(f"{_plural(len(folders), 'hidden or system folder')} ({names})")
    return listing


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder that may be classes, in the order of `class_order`."""
    folders = [path for path in folder.iterdir() if path.is_dir() and not is_system_folder(path.name)]
    return sorted(folders, key=lambda path: class_order(path.name))


def class_order(name: str) -> tuple[object, ...]:
    """A key that sorts class names as people number them: 2 before 10, `class2` before `class10`."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part), "") if number % 2 else (1, 0, part) for number, part in enumerate(parts)), name


def is_system_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Each entry below a folder with "file", "skipped" for a hidden or system folder, or the reason why it is left out."""
    waiting: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(root, (_identity(root),))]
    while waiting:
        folder, above = waiting.pop()
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError as error:
            yield folder, f"the folder cannot be read: {error.strerror or error}"
            continue
        for entry in entries:
            path = folder / entry.name
            try:
                if not entry.is_dir():
                    broken = "a broken link" if entry.is_symlink() else "neither a file nor a folder"
                    yield path, "file" if entry.is_file() else broken
                elif is_system_folder(entry.name):
                    yield path, "skipped"
                elif (identity := _identity(path)) in above:
                    yield path, "a link back to a folder that holds it"
                else:
                    waiting.append((path, (*above, identity)))
            except OSError as error:
                yield path, f"it cannot be read: {error.strerror or error}"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _counted(endings: Counter[str]) -> str:
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:NAMES_LISTED]
    listed = ", ".join(f"{printable(ending)} {count}" for ending, count in ordered)
    more = len(endings) - NAMES_LISTED
    return f"{_plural(endings.total(), 'file')} ({listed}{f' and {more} more endings' if more > 0 else ''})"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


__all__ = ["SYSTEM_FOLDERS", "ImageListing", "class_folders", "class_order", "is_system_folder", "list_images"]
