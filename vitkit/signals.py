"""Ctrl-C and SIGTERM while a model trains."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved a checkpoint."""


class Signals:
    """Ctrl-C and SIGTERM: at once outside a training step, and after it where one is under way."""

    def __init__(self) -> None:
        self.asked = False
        self._deferring = False
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
        if self.asked or not self._deferring:  # the second one does not wait; an evaluation has nothing to save
            raise Interrupted
        self.asked = True

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
