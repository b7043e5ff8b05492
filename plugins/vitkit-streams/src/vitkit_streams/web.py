"""webdataset's tar shards as a dataset."""

import atexit
import tempfile
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkit.contracts import with_example
from vitkit.data import ImageDataset, store_directory
from vitkit.validation import at_least
from vitkit_streams.shards import Cache, Fields, Shard, expanded
from vitkit_streams.splits import assemble, check_options, class_names, class_number
from vitkit_streams.writing import write_shards

IMAGES = "jpg;jpeg;png;webp"


class TarSamples:
    """The samples of several shards, numbered one shard after another."""

    def __init__(self, shards: list[Shard], cache: Cache, *, shuffle_buffer: int, open_shards: int) -> None:
        self.shards, self.cache = shards, cache
        self.shuffle_buffer, self.open_shards = shuffle_buffer, open_shards
        self.ends = torch.tensor([len(shard.offsets) for shard in shards]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, number: int) -> tuple[Shard, int]:
        at = int(torch.searchsorted(self.ends, number, right=True))
        return self.shards[at], number - (int(self.ends[at - 1]) if at else 0)

    def read(self, number: int) -> bytes:
        return self.cache.read(*self._place(number))

    def name(self, number: int) -> str:
        shard, place = self._place(number)
        return f"{shard.url}: {shard.key(place)}"

    @property
    def locality(self) -> int:
        """The size of the shuffle buffer: samples that are nearer come from shards that are open at the same time."""
        return self.shuffle_buffer

    def order(self, numbers: Tensor, generator: torch.Generator, size: int) -> Tensor:
        """Shards in a random order, `open_shards` lanes of them at a time, and a shuffle buffer in each lane.

        A batch takes from every lane in proportion to its length, one lane after another, so that ranks, which take consecutive parts of
        the batch, read different shards. The order is the same for any number of ranks.
        """
        at = torch.searchsorted(self.ends, numbers, right=True)
        turn = torch.randperm(len(self.shards), generator=generator)[at]  # of each sample: when its shard comes
        lanes = min(self.open_shards, len(self.shards))
        window = self.shuffle_buffer / lanes
        by_turn = numbers.argsort(stable=True)
        by_turn = by_turn[turn[by_turn].argsort(stable=True)]
        parts, when = [], []
        for lane in range(lanes):
            members = by_turn[turn[by_turn] % lanes == lane]
            # Each sample is delayed by less than the window, as by a buffer of that size.
            delay = torch.rand(len(members), generator=generator, dtype=torch.float64) * window
            parts.append(members[(torch.arange(len(members)) + delay).argsort(stable=True)])
            when.append((torch.arange(len(members), dtype=torch.float64) + (lane + 0.5) / lanes) / max(len(members), 1))
        order = torch.cat(parts)[torch.cat(when).argsort(stable=True)]
        batch = torch.arange(len(order)) // max(size, 1)
        return order[(batch * lanes + turn[order] % lanes).argsort(stable=True)]


def _example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A small example for the conformance kit."""
    folder = _example_shards()
    return {"urls": str(folder / "shards"), "img_size": 8, "cache": str(folder / "cache"), "workers": 2}, {}


@once
def _example_shards() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="vitkit-streams-")
    atexit.register(holder.cleanup)
    images = [np.full((16, 16, 3), 40 * (number % 3) + number, dtype=np.uint8) for number in range(30)]
    write_shards(Path(holder.name) / "shards", images, [number % 3 for number in range(30)], per_shard=8)
    return Path(holder.name)


@with_example(_example)
def webdataset(
    *,
    urls: str | list[str],
    test_urls: str | list[str] | None = None,
    img_size: int = 64,
    channels: int = 3,
    image: str = IMAGES,
    label: str = "cls",
    classes: str | list[str] | None = None,
    test_size: int = 2000,
    val_size: int | None = None,
    shuffle_buffer: int = 10_000,
    open_shards: int = 16,
    workers: int | None = None,
    cache: str | None = None,
    cache_gb: float = 50.0,
    allow_pipe: bool = False,
) -> ImageDataset:
    """Tar shards in the format of webdataset, local or remote, streamed: data may be larger than memory.

    `urls` follows webdataset: `shards/train-{000..099}.tar`, parts joined by `::`, patterns, folders; http, https and hf (s3, gs, az with
    their fsspec packages). Files that share a name up to the first dot are a sample: its image has the first of the extensions `image`,
    and its label the extension `label` (`cls`, `txt`, `json:KEY`), a number or a class name. `classes` names the classes: a list, or a
    text file with one name in each line.

    Each shard is read through once and its index is kept in `cache` (default `streams` in the dataset store). Remote shards are downloaded
    there when they are needed; the ones used last stay, up to `cache_gb` GB. Threads (`workers`) decode the middle square of each image
    to `img_size`. An epoch draws the order of shards, reads `open_shards` of them at a time and shuffles like a buffer of `shuffle_buffer`
    samples. It depends only on (seed, epoch), so that a run resumes bit for bit and any number of ranks sees each sample once. At
    most `test_size` images of `test_urls`, otherwise held out of `urls`, are in memory, and as many for validation (`val_size`).

    A damaged member of a shard and an image that cannot be decoded are left out and named. Raises `DatasetError` with its url for a shard
    that is missing, cut short or without labels, and for a label that is not one of `classes`; `UsageError` for `pipe:` urls, which run a
    command in a shell, unless `allow_pipe`.
    """
    check_options(img_size, channels, workers, test_size, val_size)
    at_least(0, shuffle_buffer=shuffle_buffer, cache_gb=cache_gb)
    at_least(1, open_shards=open_shards)
    place = Cache(Path(cache).expanduser() if cache else store_directory() / "streams", cache_gb)
    fields = Fields(image, label)

    def shards_of(some: str | list[str]) -> list[Shard]:
        return [place.shard(url, fields) for url in expanded(some, allow_pipe=allow_pipe)]

    train, test = shards_of(urls), shards_of(test_urls) if test_urls is not None else None
    names = class_names([text for shard in train for text in shard.texts], classes)
    numbers = {name: number for number, name in enumerate(names)}

    def part(shards: list[Shard]) -> tuple[TarSamples, Tensor]:
        samples = TarSamples(shards, place, shuffle_buffer=shuffle_buffer, open_shards=open_shards)
        return samples, torch.cat([_labels(shard, numbers) for shard in shards])

    samples, labels = part(train)
    return assemble(
        "webdataset", samples, labels, names, test=part(test) if test is not None else None, test_size=test_size, val_size=val_size,
        img_size=img_size, channels=channels, workers=workers, source=f"tar shards: {_listed(urls)}", licence="its owner's",
        skipped=[line for shard in [*train, *(test or [])] for line in shard.skipped],
    )  # fmt: skip


def _labels(shard: Shard, numbers: dict[str, int]) -> Tensor:
    classes = [
        class_number(text, numbers, f"the shard {shard.url}: {shard.key(int((shard.codes == code).nonzero()[0]))}")
        if text not in numbers
        else numbers[text]
        for code, text in enumerate(shard.texts)
    ]
    return torch.tensor(classes)[shard.codes]


def _listed(urls: str | list[str]) -> str:
    return urls if isinstance(urls, str) else ", ".join(urls[:3]) + (", ..." if len(urls) > 3 else "")
