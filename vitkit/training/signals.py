"""Ctrl-C, SIGTERM, SIGHUP and the death of the launcher while a model trains."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_HANGUP = getattr(signal, "SIGHUP", None)
LAUNCHER_SECONDS = 10.0
"""A second signal within this time comes from the launcher, which passes on the Ctrl-C that the terminal has sent to all."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop."""


class Signals:
    """Handlers of the signals that stop a run; the earlier handlers are restored at the end of the block.

    Within `deferred` a signal only sets `asked`, and the loop stops after the step that is running; a second signal raises
    `Interrupted` at once. Outside of it every signal raises. SIGHUP stays ignored if it is (nohup ignores it).

    Under torchrun `asked` is also true when the launcher has died: its ranks would train on without it.
    """

    def __init__(self) -> None:
        self._asked, self._deferring, self._asked_at = False, False, 0.0
        self._previous: dict[int, Any] = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def asked(self) -> bool:
        """True if the run is to stop."""
        return self._asked or (self._launcher is not None and os.getppid() != self._launcher)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number != _HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            raise Interrupted
        if not self._asked:
            self._asked, self._asked_at = True, time.monotonic()
        elif not ("RANK" in os.environ and time.monotonic() - self._asked_at < LAUNCHER_SECONDS):
            raise Interrupted

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait for the end of the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def raise_if_asked(self) -> None:
        """Raise `Interrupted` if a signal has been deferred."""
        if self.asked:
            raise Interrupted


def ignore_termination() -> None:
    """Ignore SIGTERM from now on: this process reports an error and then ends by itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


__all__ = ["STOPPING", "Interrupted", "Signals", "ignore_termination"]
