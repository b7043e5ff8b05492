"""A person's own pictures as a dataset."""

import hashlib
from dataclasses import replace
from pathlib import Path

from vitkit.data import ImageDataset, from_store
from vitkit.pictures import import_folder, sources_of
from vitkit.store import read_store, store_path


def image_folder(*, root: str, img_size: int = 64, test_fraction: float = 0.2) -> ImageDataset:
    """Your own pictures: a folder a class of PNG, JPEG or WebP files, resized once into the store.

    `root` holds a folder a class, or `train` and `test` (or `val`) folders that do; without the latter every class
    gives `test_fraction` of its pictures, chosen by their names, to the test split. Pictures are turned upright by
    their EXIF data, made RGB, resized on their shorter side and cropped to the centre. One that cannot be read is named
    in `skipped` and left out. The store's copy is made anew when a file is added, removed or changed. Raises
    `DatasetError` where there is no folder, fewer than two classes or no readable picture.
    """
    folder = Path(root).expanduser()
    sources = sources_of(folder, test_fraction)
    listing = [f"{split} {path} {path.stat().st_mtime_ns} {path.stat().st_size}" for split, _, path in sources]
    key = hashlib.sha256("\n".join([*listing, str(img_size), str(test_fraction)]).encode()).hexdigest()[:16]
    name = f"folder-{key}"
    skipped: list[str] = []
    if not store_path(name).exists():
        skipped = import_folder(folder, name, img_size=img_size, test_fraction=test_fraction)
    found = from_store(read_store(store_path(name)), source=str(folder.resolve()), licence="yours")
    return replace(found, name=folder.resolve().name, skipped=skipped, notice=_named(skipped))


def _named(skipped: list[str]) -> str:
    if not skipped:
        return ""
    more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return f"{len(skipped)} pictures could not be read and were left out: {'; '.join(skipped[:5])}{more}"
