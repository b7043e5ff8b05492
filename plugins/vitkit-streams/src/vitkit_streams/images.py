"""Images that threads read and decode while the model computes: `vitkit.contracts.LazyImages`."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from vitkit.data import ImageReadError, read_square
from vitkit.errors import DatasetError, printable

BATCHES_AHEAD = 3
"""Batches that are read ahead; only their decoded images are in memory."""


class Samples(Protocol):
    """Encoded images by their number from 0."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> bytes:
        """The image file; `ImageReadError` if it is left out, `DatasetError` if the shard or table that holds it is not readable."""
        ...

    def name(self, number: int) -> str:
        """The place of the image, for a person."""
        ...

    @property
    def locality(self) -> int:
        """Samples at most this many positions apart in `order` are cheap to read together."""
        ...

    def order(self, numbers: Tensor, generator: torch.Generator, size: int) -> Tensor:
        """A permutation of 0 … m − 1 for `numbers` `(m,)`, for batches of `size`."""
        ...


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """The images `rows` int64 `(n,)` of `samples`, decoded to uint8 `(channels img_size img_size)` by `workers` threads.

    An image that cannot be decoded is left out and named in `skipped`, once. A shard or a table that cannot be read raises
    `DatasetError`.
    """

    samples: Samples
    rows: Tensor
    img_size: int
    channels: int = 3
    workers: int = 4
    _problems: dict[int, str] = field(default_factory=dict, repr=False)  # by the number of the image; shared with subsets

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), self.channels, self.img_size, self.img_size)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def ndim(self) -> int:
        return 4

    @property
    def skipped(self) -> list[str]:
        return [f"{self.samples.name(number)}: {problem}" for number, problem in sorted(self._problems.items())]

    @property
    def locality(self) -> int:
        return self.samples.locality

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, shares: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each index tensor the images `(k c h w)` that can be decoded and their rows `(k,)`, up to `BATCHES_AHEAD` ahead."""
        waiting: deque[tuple[Tensor, list[Future[Tensor | None]]]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="vitkit-streams") as pool:
            try:
                for share in shares:
                    waiting.append((share, [pool.submit(self._decode, row) for row in share.tolist()]))
                    if len(waiting) > BATCHES_AHEAD:
                        yield self._collect(*waiting.popleft())
                while waiting:
                    yield self._collect(*waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images `(m c h w)` of the rows `index`; `DatasetError` for one that cannot be decoded."""
        ((images, rows),) = self.read([index])
        if len(rows) < len(index):
            raise DatasetError(f"{self.skipped[0]}; it is requested by its number and cannot be left out: remove it from the data")
        return images

    def subset(self, rows: Tensor) -> "StreamedImages":
        """The same images, fewer or repeated."""
        return replace(self, rows=self.rows[rows])

    def order(self, generator: torch.Generator, size: int) -> Tensor:
        """A permutation of all rows, drawn by `generator`, in which neighbours are cheap to read together."""
        return self.samples.order(self.rows, generator, size)

    def _decode(self, row: int) -> Tensor | None:
        number = int(self.rows[row])
        try:
            return decode(self.samples.read(number), self.img_size, self.channels)
        except ImageReadError as error:
            self._problems.setdefault(number, printable(error))
            return None

    def _collect(self, share: Tensor, futures: list[Future[Tensor | None]]) -> tuple[Tensor, Tensor]:
        decoded = [future.result() for future in futures]
        images = [image for image in decoded if image is not None]
        kept = share[torch.tensor([image is not None for image in decoded], dtype=torch.bool)]
        return torch.stack(images) if images else torch.empty((0, *self.shape[1:]), dtype=torch.uint8), kept


def decode(body: bytes, size: int, channels: int) -> Tensor:
    """An image file's content → uint8 `(channels size size)`, its middle square; `vitkit.data.ImageReadError`."""
    return read_square(body, size, channels)


def default_workers() -> int:
    """One thread for each core that this process may use, minus one for the model, and at least two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores - 1, 2), 16)
