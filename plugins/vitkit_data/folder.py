"""A folder of your own images as a dataset."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from vitkit.data import ImageDataset, Stored, from_store, import_folder, read_layout, read_store, store_lock, store_path
from vitkit.errors import DatasetError


def image_folder(
    *, root: str, img_size: int = 64, test_fraction: float = 0.2, val_size: int | None = None, unlabelled: bool = False
) -> ImageDataset:
    """Your own images: a folder for each class, or images without labels, resized once into the store.

    `root` holds a folder for each class, or folders train, val and test that do; `vitkit data import --help` lists the layouts. Without
    a test folder each class gives `test_fraction` of its images to the test split; without a val folder `val_size` of the training
    images (default: a tenth) are for validation. With `unlabelled` folders are no classes. An image that cannot be read is named in
    `skipped` and `notice` and left out. The store's copy is made again when a file is added, removed or changed. Raises `DatasetError`
    if there is no folder, only one class or no readable image.
    """
    folder = Path(root).expanduser().resolve()
    files = read_layout(folder, test_fraction, unlabelled=unlabelled).files
    stats = [(file.path.stat().st_mtime_ns, file.path.stat().st_size) for file in files]
    listing = _digest([(str(file.path), file.split, file.label, *stat) for file, stat in zip(files, stats, strict=True)])
    name = f"folder-{_digest([str(folder), img_size, test_fraction, unlabelled])}"
    with store_lock(name):
        stored = _current(name, listing)
        if stored is None:
            import_folder(folder, name, img_size=img_size, test_fraction=test_fraction, unlabelled=unlabelled, listing=listing)
            stored = read_store(store_path(name))
    dataset = from_store(stored, val_size=val_size, source="a folder of images", licence="its owner's")
    return replace(dataset, name=folder.name, notice=_notice(dataset.skipped))


def _current(name: str, listing: str) -> Stored | None:
    """The store's copy, or None if it is not readable or was made of other files."""
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
    return f"{len(skipped)} left out of the images: {'; '.join(skipped[:5])}{more}"
