"""Consoles for lines and tables on a terminal or in a pipe, and durations: results go to `out`, all other lines to `err`.

They do not interpret their text as markup, so foreign text is safe once it is printable (see `cell`).
"""

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from vitkit.errors import printable

PIPE_COLUMNS = 240
"""Width of a table where the output is not a terminal: wide enough to keep a row on one line."""


class TextConsole(Console):
    """A rich console that prints plain text and tables."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print lines, unwrapped, or tables, as wide as the terminal or `PIPE_COLUMNS` wide where there is none."""
        if all(isinstance(part, str | Text) for part in objects):
            super().print(*objects, **options)
            return
        console = self if self.is_terminal else TextConsole(stderr=self.stderr, width=PIPE_COLUMNS)
        super(TextConsole, console).print(*objects, **{**options, "soft_wrap": False})


out = TextConsole()
err = TextConsole(stderr=True)


def cell(text: object, style: str = "") -> Text:
    """A foreign string, made printable, for a table or a line."""
    return Text(printable(text), style)


def duration(seconds: float) -> str:
    """Seconds in their two largest units: "2 h 5 min", "5 min 3 s", "42 s", "1.3 s"."""
    if not math.isfinite(seconds):
        return "–"
    rounded = round(seconds)
    hours, minutes = rounded // 3600, rounded // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rounded % 60} s"
    return f"{seconds:.2g} s" if seconds < 9.5 else f"{rounded} s"


__all__ = ["TextConsole", "cell", "duration", "err", "out"]
