"""Batches for the training loop: an adapter for plain iterables, the check of a batch, and a thread that prepares the next one."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import UsageError
from vitkit.seeding import derive_seed


class Sized(Protocol):
    """An iterable with a length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class LoaderBatches:
    """Any sized iterable of batches, a torch DataLoader for example, as `contracts.Batches`.

    The global generators of torch, Python and NumPy are seeded from (seed, epoch, index) while the iterable makes a batch, and restored
    afterwards. A run that resumes within an epoch makes the earlier batches again and drops them, so that the later ones are the same
    as without an interruption. torch seeds a DataLoader's workers from the epoch: keep their number, and leave out
    `persistent_workers` and `generator`, because their states depend on earlier epochs.
    """

    def __init__(self, loader: Sized) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        if world > 1:
            raise UsageError("on several devices give run.fit `split.batches(...)`, which divides itself over the ranks")
        with _global_seed(derive_seed(seed, "loader", number)):
            batches = iter(self.loader)
        for index in count():
            with _global_seed(derive_seed(seed, "loader", number, index)):
                batch = next(batches, None)
            if batch is None:
                return
            if index >= start:
                check_batch(batch)
                yield map_batch(batch, lambda value: value.to(device, non_blocking=True))


def check_batch(batch: Any) -> None:
    """Raise `UsageError` for a batch that is not a dict of tensors, or tuples of tensors, with one sample per row."""
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"a batch is a dict of tensors, such as {{'images': ..., 'labels': ...}}; the loader gave a {type(batch).__name__}: make "
            f"a dict in its collate_fn"
        )
    for name, value in batch.items():
        for part in value if isinstance(value, tuple | list) and value else [value]:
            if not isinstance(part, Tensor) or part.ndim == 0:
                kind = "a tensor without dimensions" if isinstance(part, Tensor) else f"a {type(part).__name__}"
                verb = "is" if part is value else "holds"
                expected = "expected a tensor with one row per sample (turn texts into ids first)"
                raise UsageError(f"the batch's {name!r} {verb} {kind}; {expected}")
    if not batch:
        raise UsageError("a batch is a dict of tensors; the loader gave an empty dict")


def map_batch(batch: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The batch with `change` applied to every tensor, also to tensors in a tuple of views."""
    return {
        name: tuple(map(change, value)) if isinstance(value, tuple | list) else change(value) for name, value in batch.items()
    }  # fmt: skip


def tensors_of(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor of a batch."""
    for value in batch.values():
        yield from value if isinstance(value, tuple | list) else (value,)


def samples_of(batch: Mapping[str, Any]) -> int:
    """The number of samples in a batch."""
    return len(batch["labels"] if "labels" in batch else next(tensors_of(batch)))


def prefetch(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, the next one prepared by a thread while the caller works.

    For CUDA, where a step leaves the processor idle. On a CPU the step itself uses the cores: eight steps of a small ViT with augmented
    batches took 0.52 s with this thread and 0.52 s without it (one thread of an EPYC).
    """
    with ThreadPoolExecutor(1, thread_name_prefix="vitkit batches") as thread:
        ahead = thread.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(next, batches, None)
            yield batch


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed the CPU's global generators for a block; afterwards they continue from their earlier states."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


__all__ = ["LoaderBatches", "check_batch", "map_batch", "prefetch", "samples_of", "tensors_of"]
