"""A person's own pictures as a dataset."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from vitkit.data import ImageDataset, Stored, from_store, import_folder, pictures_of, read_store, store_lock, store_path
from vitkit.errors import DatasetError


def image_folder(*, root: str, img_size: int = 64, test_fraction: float = 0.2) -> ImageDataset:
    """Your own pictures: a folder a class of PNG, JPEG or WebP files, resized once into the store.

    `root` holds a folder a class, or folders `train` and `test` (or `val`) that do; without the latter each class
    gives `test_fraction` of its pictures to the test split. A picture that cannot be read is named in `skipped` and
    `notice` and left out. The store's copy is made anew when a file is added, removed or changed. Raises
    `DatasetError` where there is no folder, fewer than two classes or no readable picture.
    """
    folder = Path(root).expanduser().resolve()
    pictures, _ = pictures_of(folder, test_fraction)
    found = [(str(p.path), p.path.stat().st_mtime_ns, p.path.stat().st_size) for p in pictures]
    listing = _digest(found)
    name = f"folder-{_digest([str(folder), img_size, test_fraction])}"
    with store_lock(name):
        stored = _current(name, listing)
        if stored is None:
            import_folder(folder, name, img_size=img_size, test_fraction=test_fraction, listing=listing)
            stored = read_store(store_path(name))
    dataset = from_store(stored, source="a folder of pictures", licence="its owner's")
    return replace(dataset, name=folder.name, notice=_notice(dataset.skipped))


def _current(name: str, listing: str) -> Stored | None:
    """The store's copy, where there is a sound one of these very files."""
    try:
        stored = read_store(store_path(name))
    except DatasetError:
        return None
    return stored if stored.metadata.get("listing") == listing else None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _notice(skipped: list[str]) -> str:
    if not skipped:
        return ""
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return f"{len(skipped)} left out of the pictures: {'; '.join(skipped[:5])}{more}"
