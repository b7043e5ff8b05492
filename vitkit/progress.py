"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 30.0
"""How often a line is printed where there is no terminal."""


class Progress:
    """The progress of `epochs` epochs of `steps` batches each, on `console`."""

    def __init__(self, epochs: int, steps: int, console: Console) -> None:
        self.epochs, self.steps, self.console = epochs, steps, console
        self._printed = time.monotonic()
        self._bar: Bar | None = None
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[parts]}"),
                TimeRemainingColumn(elapsed_when_finished=True), console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=epochs * steps, parts="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: int, batch: int, parts: Mapping[str, float], images_per_second: float) -> None:
        """Show the mean losses so far of an epoch, after its `batch`-th batch."""
        shown = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
        done = (epoch - 1) * self.steps + batch
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, description=f"epoch {epoch}/{self.epochs}",
                parts=f"{shown} · {images_per_second:.0f} images/s",
            )  # fmt: skip
        elif time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            share = done / max(self.epochs * self.steps, 1)
            self.line(
                f"epoch {epoch}/{self.epochs} | batch {batch}/{self.steps} | {shown} | {images_per_second:.0f} images/s "
                f"| {share:.0%} done"
            )

    def line(self, text: str) -> None:
        """One line above the bar."""
        (self._bar.console if self._bar is not None else self.console).print(text, markup=False)
