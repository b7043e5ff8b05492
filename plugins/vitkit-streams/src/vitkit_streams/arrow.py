"""Hugging Face `datasets` as a dataset: memory-mapped arrow tables whose rows are read by number.

A row holds an image's file, or its path. A path is followed only where it leads to a file of the data set: below the folder that was
named, or in the cache that `datasets` filled for it.
"""

import atexit
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitkit.contracts import with_example
from vitkit.data import MAX_FILE_BYTES, ImageDataset, ImageReadError
from vitkit.errors import DatasetError, UsageError, nearest, printable
from vitkit_streams.splits import assemble, check_options, class_names, class_number

TEST_SPLITS = ("test", "validation", "val", "valid")
IMAGES, LABELS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "fine_label", "cls", "class")


class ArrowSamples:
    """The rows of one split, with their images as files; no table is ever completely in memory.

    `roots` are the folders that a path in a row may lead into.
    """

    def __init__(self, table: Any, column: str, name: str, roots: Sequence[Path] = ()) -> None:
        import datasets

        self.table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.title, self.roots = column, name, [root.resolve() for root in roots]

    def __len__(self) -> int:
        return len(self.table)

    def read(self, number: int) -> bytes:
        try:
            cell = self.table[number][self.column]
        except OSError as error:
            raise DatasetError(f"{self.name(number)} cannot be read: {error.strerror or error}") from None
        if cell is None:
            return b""
        body: bytes | None = cell["bytes"]
        return body if body is not None else self._file(cell["path"])

    def _file(self, path: str | None) -> bytes:
        try:
            place = Path(path or "").resolve()
            if not any(place.is_relative_to(root) for root in self.roots):
                raise ImageReadError(f"its path {printable(path)!r} leads out of the data set")
            if not place.is_file():
                raise ImageReadError(f"there is no file at its path {printable(path)!r}")
            if place.stat().st_size > MAX_FILE_BYTES:
                raise ImageReadError(f"its file has {place.stat().st_size:,} bytes; expected at most {MAX_FILE_BYTES:,}")
            return place.read_bytes()
        except (OSError, ValueError) as error:  # ImageReadError is a ValueError
            raise ImageReadError(printable(error)) from None

    def name(self, number: int) -> str:
        return f"{self.title}: row {number}"

    @property
    def locality(self) -> int:
        """All rows: each row of a mapped file is as cheap to read as any other."""
        return len(self)

    def order(self, numbers: Tensor, generator: torch.Generator, size: int) -> Tensor:
        return torch.randperm(len(numbers), generator=generator)


def _example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A small example for the conformance kit."""
    return {"path": str(_example_folder()), "img_size": 8, "workers": 2}, {}


@once
def _example_folder() -> Path:
    import datasets

    holder = tempfile.TemporaryDirectory(prefix="vitkit-streams-")
    atexit.register(holder.cleanup)
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for number in range(30):
        body = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 40 * (number % 3) + number, dtype=np.uint8)).save(body, "PNG")
        rows["image"].append({"bytes": body.getvalue(), "path": None})
        rows["label"].append(number % 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "grey", "light"])})
    folder = Path(holder.name) / "images"
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


@with_example(_example)
def hf_dataset(
    *,
    path: str,
    config: str | None = None,
    split: str = "train",
    test_split: str | None = None,
    revision: str | None = None,
    data_files: str | list[str] | None = None,
    image: str | None = None,
    label: str | None = None,
    classes: str | list[str] | None = None,
    img_size: int = 64,
    channels: int = 3,
    test_size: int = 2000,
    val_size: int | None = None,
    workers: int | None = None,
) -> ImageDataset:
    """A dataset of the Hugging Face Hub or of a folder, by `datasets`: memory-mapped arrow tables, larger than memory too.

    `path` is a repository (`uoft-cs/cifar10`), of which `revision` names a branch, tag or commit, a folder that `save_to_disk`
    wrote, or a loader's name (`imagefolder`, `parquet`, with `data_files`). `split` is trained on. At most `test_size` images of
    `test_split`, by default `test` or `validation` where there is one, otherwise held out of `split`, are in memory, and as many for
    validation (`val_size`). `image` and `label` are columns, by default the usual names; a label is a `ClassLabel`, a number or a class
    name. Threads (`workers`) decode the middle square of each image to `img_size`. An epoch is one permutation of all rows, drawn from
    (seed, epoch).

    An image that cannot be decoded, or whose path leads out of the data set, is left out and named. Where the Hub is not reachable, the
    last copy is taken, unless a `revision` was given that it may not be; `source` names the commit. Raises `DatasetError` with the
    message of `datasets` if the dataset is not available, and for a row without a label; `UsageError` for a split or a column that does
    not exist.
    """
    check_options(img_size, channels, workers, test_size, val_size)
    loaded = _load(path, config, revision, data_files)
    splits = loaded.splits
    if split not in splits:
        raise UsageError(f"{path} has no split {split!r}{nearest(split, splits) or ';'} it has {', '.join(splits)}")
    if test_split is not None and test_split not in splits:
        raise UsageError(f"{path} has no split {test_split!r}{nearest(test_split, splits) or ';'} it has {', '.join(splits)}")
    test_split = test_split or next((name for name in TEST_SPLITS if name in splits and name != split), None)
    table = splits[split]
    image_column, label_column = _column(table, image, IMAGES, "image", path), _column(table, label, LABELS, "label", path)
    names = _class_names(table, label_column, classes, f"{path} ({split})")
    labels = _labels(table, label_column, names, f"{path} ({split})")
    test = None
    if test_split is not None:
        other, title = splits[test_split], f"{path} ({test_split})"
        test = ArrowSamples(other, image_column, title, loaded.roots), _labels(other, label_column, names, title)
    info = table.info
    dataset = assemble(
        path.rstrip("/").rpartition("/")[2], ArrowSamples(table, image_column, f"{path} ({split})", loaded.roots), labels, names, test=test,
        test_size=test_size, val_size=val_size, img_size=img_size, channels=channels, workers=workers,
        source=(info.homepage or f"Hugging Face datasets: {path}") + (f", commit {loaded.commit}" if loaded.commit else ""),
        licence=info.license or "its owner's", hub_id=loaded.repo,
    )  # fmt: skip
    return replace(dataset, notice="; ".join(filter(None, (loaded.notice, dataset.notice))))


@dataclass(frozen=True)
class Loaded:
    """The tables by split, and the folders that hold their files; of a repository also its id, the commit, and a notice on a copy."""

    splits: dict[str, Any]
    roots: tuple[Path, ...]
    repo: str = ""
    commit: str = ""
    notice: str = ""


def _load(path: str, config: str | None, revision: str | None, data_files: str | list[str] | None) -> Loaded:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import constants

    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            return Loaded(dict(datasets.load_from_disk(str(folder))), (folder,))
        if (folder / "state.json").is_file():
            return Loaded({"train": datasets.load_from_disk(str(folder))}, (folder,))
        name = str(folder) if folder.exists() else path
        builder = datasets.load_dataset_builder(name, config, revision=revision, data_files=data_files)
        builder.download_and_prepare()
        splits = dict(builder.as_dataset())
    except Exception as error:  # the Hub, builders and file systems raise many kinds
        reason = printable(f"{type(error).__name__}: {error}", 400).rstrip(".")
        raise DatasetError(f"the dataset {path!r} is not available: {reason}; {_advice(error)}") from None
    if builder.repo_id is None:
        given = [data_files] if isinstance(data_files, str) else data_files or []
        local = tuple(Path(file).expanduser().parent for file in given if "://" not in file and not any(letter in file for letter in "*?["))
        return Loaded(splits, (folder, *local) if folder.is_dir() else local)
    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{builder.repo_id.replace('/', '--')}"
    downloads = Path(datasets.config.DOWNLOADED_DATASETS_PATH)
    notice = ""
    if isinstance(builder, Cache) and revision != builder.hash:  # if the Hub fails, `datasets` takes its copy of any revision
        copy = f"{path} is not available from the Hub, and the copy on this machine is of commit {builder.hash}"
        if revision not in (None, "main"):
            raise DatasetError(f"{copy}, not known to be {revision!r}; check the network, or give revision={builder.hash}")
        notice = f"{copy}; this copy is used, and may not be the newest"
    return Loaded(splits, (cached, downloads), builder.repo_id, builder.hash or "", notice)


def _advice(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, DatasetNotFoundError) or status in (401, 403):
        return "check its name and revision; a private or gated one needs `hf auth login`, or the HF_TOKEN of an account that may read it"
    if isinstance(error, ConnectionError):
        return "check the network, and HF_ENDPOINT where it is set, or give a folder that save_to_disk wrote"
    return "check its name, config and revision, and the network, or give a folder that save_to_disk wrote"


def _column(table: Any, given: str | None, usual: tuple[str, ...], role: str, path: str) -> str:
    columns = list(table.column_names)
    if given is not None and given in columns:
        return given
    column = next((name for name in usual if name in columns), None)
    if given is not None or column is None:
        missing = f"no column {given!r}" if given is not None else f"no column called {', '.join(usual)}"
        listed = printable(", ".join(columns))
        raise UsageError(f"{path} has {missing}{nearest(given or role, columns) or ';'} name the {role}: {role}=...; it has {listed}")
    return column


def _class_names(table: Any, column: str, given: str | list[str] | None, where: str) -> list[str]:
    names = getattr(table.features[column], "names", None)
    if names and given is None:
        return list(names)
    texts = [str(value) for value in table.unique(column) if value is not None]
    if not texts:
        raise DatasetError(f"{where}: no row has a label in the column {column!r}")
    return class_names(texts, given)


def _labels(table: Any, column: str, names: list[str], where: str) -> Tensor:
    numbers = {name: number for number, name in enumerate(names)}
    numbered: dict[Any, int] = {}
    labels = torch.empty(len(table), dtype=torch.int64)
    is_class = getattr(table.features[column], "names", None)
    start = 0
    for batch in table.select_columns([column]).iter(batch_size=10_000):
        for value in batch[column]:
            if value is None or (is_class and not 0 <= value < len(names)):
                raise DatasetError(f"{where}: row {start} has no label in the column {column!r}; filter such rows out")
            if value not in numbered:
                numbered[value] = value if is_class else class_number(str(value), numbers, f"{where}: row {start}")
            labels[start] = numbered[value]
            start += 1
    return labels
