"""Consoles for lines and tables on a terminal or in a pipe: results go to `out`, all other lines to `err`.

They do not interpret their text as markup, so foreign text is safe once it is printable (see `cell`).
"""

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


__all__ = ["TextConsole", "cell", "err", "out"]
