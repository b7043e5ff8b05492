"""Ctrl-C and SIGTERM while a model trains."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

LAUNCHER_SECONDS = 10.0
"""So long after a first signal another one is a launcher's, which passes on the Ctrl-C that the terminal has sent already."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved a checkpoint."""


class Signals:
    """Ctrl-C and SIGTERM: at once outside a training step, and after it where one is under way."""

    def __init__(self) -> None:
        self.asked = False
        self._deferring = False
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._previous[name] = signal.signal(name, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:  # an evaluation has nothing to save
            raise Interrupted
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
        elif not ("RANK" in os.environ and time.monotonic() - self._since < LAUNCHER_SECONDS):
            raise Interrupted  # the second one does not wait

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def raise_if_asked(self) -> None:
        if self.asked:
            raise Interrupted


def ignore_termination() -> None:
    """From here on SIGTERM is not heeded: this process is about to end by itself, and has something to say before."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
