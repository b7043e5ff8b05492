"""A watchdog over the other ranks: when one of them or the launcher dies, this rank stops soon and gives the reason.

A launcher ends the processes of a job on its machine only. A process group's `timeout` counts the time of one collective: it has to be
longer than the slowest legitimate wait, an evaluation or a report on rank 0, and defaults to 10 minutes with NCCL and to 30 with gloo. It
also ends without naming the rank that failed. Therefore each rank writes a heartbeat into the process group's store, and its error before
it stops.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 5.0
"""Seconds between two heartbeats of a rank."""
SILENT_SECONDS = 40.0
"""A rank without a heartbeat for this time counts as dead, unless this rank has made progress in that time."""
GRACE_SECONDS = 10.0
"""Time for the main thread to stop by itself once the failure of another rank is known."""
ERROR, DONE = "vitkit/error", b"done"


class RankWatchdog:
    """Watches the other ranks of a job from a thread, through the process group's store; with one process it does nothing.

    `say` is called with the reason before this process is ended.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._over, self._moved = say, threading.Event(), time.monotonic()
        self._store: Any = None
        # torchrun is the parent of its ranks; without torchrun the parent process does not matter.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
            with contextlib.suppress(Exception):  # a separate connection for the thread, where the store offers one
                store = store.clone()
            self._store = dist.PrefixStore(f"vitkit-{_runs_begun()}", store)
            self._beat(b"0")
            self._thread = threading.Thread(target=self._watch, name="vitkit watchdog", daemon=True)
            self._thread.start()

    def moved(self) -> None:
        """Record that this rank made progress, for example a step that needed the other ranks."""
        self._moved = time.monotonic()

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks the error that stops this rank; only the first error of a job is kept."""
        if self._store is not None and not self._over.is_set():
            with contextlib.suppress(Exception):
                if not self._store.check([ERROR]):
                    self._store.set(ERROR, f"rank {self._rank}: {type(error).__name__}: {error}")

    def failure(self, *, wait: float = 0.0) -> str:
        """The error that stopped another rank, or an empty string; `wait` is in seconds."""
        until = time.monotonic() + wait
        while self._store is not None:
            with contextlib.suppress(Exception):
                if self._store.check([ERROR]):
                    failure = self._store.get(ERROR).decode(errors="replace")
                    return "" if failure.startswith(f"rank {self._rank}:") else failure
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        return ""

    def close(self) -> None:
        """End the watch: this rank and the others no longer need each other."""
        if self._store is not None and not self._over.is_set():
            self._over.set()
            with contextlib.suppress(Exception):
                self._beat(DONE)
            self._thread.join(timeout=1.0)

    def _beat(self, value: bytes) -> None:
        self._store.set(f"vitkit/beat/{self._rank}", value)

    def _watch(self) -> None:
        others = [rank for rank in range(self._world) if rank != self._rank]
        heard = {rank: (b"", time.monotonic()) for rank in others}
        count, reached = 0, time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            count += 1
            now = time.monotonic()
            with contextlib.suppress(Exception):  # the store lives in rank 0's process, or in its launcher's
                self._beat(str(count).encode())
                for rank in others:
                    name = f"vitkit/beat/{rank}"
                    beat = self._store.get(name) if self._store.check([name]) else b""
                    if beat == DONE or beat != heard[rank][0]:
                        heard[rank] = (beat, now)
                reached = now
            failure = self.failure()
            silent = [rank for rank, (_, then) in heard.items() if now - then > SILENT_SECONDS]
            if self._launcher and os.getppid() != self._launcher:
                self._stop("the launcher that started this rank is gone, so this rank stops", signal.SIGTERM)
            elif failure:
                self._stop(f"another rank has failed, so this one stops: {failure}")
            elif now - self._moved > SILENT_SECONDS and now - reached > SILENT_SECONDS:
                self._stop("rank 0, or the machine it runs on, is gone, so this rank stops")
            elif now - self._moved > SILENT_SECONDS and silent:
                self._stop(f"nothing was heard of rank {', '.join(map(str, silent))} for {SILENT_SECONDS:.0f} s, so this one stops")

    def _stop(self, reason: str, signal_number: int | None = None) -> None:
        """Call `say` and end the process, unless the main thread ends first; a signal makes the main thread save a checkpoint."""
        if signal_number is not None:
            os.kill(os.getpid(), signal_number)
        if self._over.wait(GRACE_SECONDS):  # the main thread has reported the failure itself
            return
        with contextlib.suppress(Exception):
            self._say(reason)
        sys.stderr.flush()
        os._exit(1)  # the main thread may never return from a collective


_begun = 0


def _runs_begun() -> int:
    """A number for each run of a process, the same on every rank, so that runs have separate keys."""
    global _begun
    _begun += 1
    return _begun


def is_collective(error: BaseException) -> bool:
    """True if an error comes from a collective in which another rank is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL"))
    )


__all__ = ["RankWatchdog", "is_collective"]
