"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from vitkit.console import duration

PLAIN_SECONDS = 30.0
"""Seconds between two lines without a terminal."""
ESTIMATE_SECONDS = 60.0
"""Seconds of training after which a line estimates the time that the run takes."""


class Progress:
    """The progress of `epochs` epochs of `steps` batches each, on `console`."""

    def __init__(self, epochs: int, steps: int, console: Console) -> None:
        self.epochs, self.steps, self.console = epochs, steps, console
        self._printed = self._began = time.monotonic()
        self._first: int | None = None
        self._estimated = False
        self._bar: Bar | None = None
        if console.is_terminal:
            # A narrow terminal cuts off the losses first and keeps the time left.
            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self._bar = Bar(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=max(6, console.width // 12)),
                TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[rate]}", markup=False, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[parts]}", markup=False, table_column=rest),
                console=console, transient=True, expand=True, speed_estimate_period=120.0,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=epochs * steps, parts="", rate="")

    def start(self) -> None:
        """Begin to draw the bar."""
        self._printed = self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        """Remove the bar; the lines above it stay."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def step(self, epoch: int, batch: int, parts: Mapping[str, float], images_per_second: float) -> None:
        """Show the mean losses so far of an epoch, after its `batch`-th batch; both count from 1."""
        losses = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
        rate = f"{images_per_second:,.0f} images/s"
        done = (epoch - 1) * self.steps + batch
        if self._first is None:
            self._first, self._began = done, time.monotonic()
        self._estimate(done)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, description=f"epoch {epoch}/{self.epochs}", parts=losses, rate=rate
            )
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.line(
                f"epoch {epoch}/{self.epochs} | batch {batch}/{self.steps} | {losses} | {rate} | {self._left(done)}"
            )

    def line(self, text: str) -> None:
        """Print one line above the bar, without wrapping it."""
        (self._bar.console if self._bar is not None else self.console).print(text, markup=False, soft_wrap=True)

    def _left(self, done: int) -> str:
        """The share that is done and the time that the rest takes, at the rate since this process began."""
        share = f"{done / max(self.epochs * self.steps, 1):.0%} done"
        seconds = self._seconds_left(done)
        return share if seconds is None else f"{share} | {duration(seconds)} left"

    def _seconds_left(self, done: int) -> float | None:
        """None until a step has been timed."""
        taken = done - (self._first if self._first is not None else done)
        if taken <= 0:
            return None
        return (time.monotonic() - self._began) / taken * (self.epochs * self.steps - done)

    def _estimate(self, done: int) -> None:
        """One line, after the first minute: how long the run takes. Evaluations so far are part of the rate."""
        if self._estimated or time.monotonic() - self._began < ESTIMATE_SECONDS:
            return
        seconds = self._seconds_left(done)
        if seconds is not None:
            self._estimated = True
            self.line(f"at this rate the run takes another {duration(seconds)}")
