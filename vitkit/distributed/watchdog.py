"""Ranks that look after each other: when one of them dies, the others stop soon and say why.

Launchers end a job's processes on their own machine. On another one, or where a collective never returns, a rank would wait for
its peer until the backend's time runs out, which may take half an hour.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 5.0
"""How often each rank says that it lives."""
SILENT_SECONDS = 40.0
"""After how long without a word a rank is given up, where this one has not got on meanwhile either."""
GRACE_SECONDS = 10.0
"""How long the main thread may take to stop by itself once another rank's failure is known."""
ERROR, DONE = "vitkit/error", b"done"


class RankWatchdog:
    """The other ranks of a job, as a thread of this one sees them through the process group's store; nothing with one process.

    `say` is told what happened to another rank before this process is ended.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._over, self._moved = say, threading.Event(), time.monotonic()
        self._store: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
            with contextlib.suppress(Exception):  # a connection of the thread's own, where the store has such
                store = store.clone()
            self._store = dist.PrefixStore(f"vitkit-{_runs_begun()}", store)
            self._beat(b"0")
            self._thread = threading.Thread(target=self._watch, name="vitkit peers", daemon=True)
            self._thread.start()

    def moved(self) -> None:
        """This rank has got on: with a step, say, for which it needed the others."""
        self._moved = time.monotonic()

    def tell(self, error: BaseException) -> None:
        """Let the others know what this rank fails of; the first one to fail is heard."""
        if self._store is not None and not self._over.is_set():
            with contextlib.suppress(Exception):
                if not self._store.check([ERROR]):
                    self._store.set(ERROR, f"rank {self._rank}: {type(error).__name__}: {error}")

    def failure(self, *, wait: float = 0.0) -> str:
        """What another rank has said that it fails of, or an empty string."""
        until = time.monotonic() + wait
        while self._store is not None:
            with contextlib.suppress(Exception):
                if self._store.check([ERROR]):
                    said = self._store.get(ERROR).decode(errors="replace")
                    return "" if said.startswith(f"rank {self._rank}:") else said
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        return ""

    def close(self) -> None:
        """This rank needs the others no longer, nor they it."""
        if self._store is not None and not self._over.is_set():
            self._over.set()
            with contextlib.suppress(Exception):
                self._beat(DONE)
            self._thread.join(timeout=1.0)

    def _beat(self, what: bytes) -> None:
        self._store.set(f"vitkit/beat/{self._rank}", what)

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
                    word = self._store.get(name) if self._store.check([name]) else b""
                    if word == DONE or word != heard[rank][0]:
                        heard[rank] = (word, now)
                reached = now
            failure = self.failure()
            silent = [rank for rank, (_, then) in heard.items() if now - then > SILENT_SECONDS]
            if failure:
                self._stop(f"another rank has failed, so this one stops: {failure}")
            elif now - self._moved > SILENT_SECONDS and now - reached > SILENT_SECONDS:
                self._stop("rank 0, or the machine it runs on, is gone, so this rank stops")
            elif now - self._moved > SILENT_SECONDS and silent:
                self._stop(f"nothing was heard of rank {', '.join(map(str, silent))} for {SILENT_SECONDS:.0f} s, so this one stops")

    def _stop(self, why: str) -> None:
        if self._over.wait(GRACE_SECONDS):  # its collective has failed, or it was told to stop: it says so itself
            return
        with contextlib.suppress(Exception):
            self._say(why)
        sys.stderr.flush()
        os._exit(1)  # the main thread may never come back from a collective


_begun = 0


def _runs_begun() -> int:
    """A number for each run of a process, the same on every rank: each run has words of its own."""
    global _begun
    _begun += 1
    return _begun


def is_collective(error: BaseException) -> bool:
    """Whether an error comes from a collective whose other side is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL"))
    )


__all__ = ["RankWatchdog", "is_collective"]
