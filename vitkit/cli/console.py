"""The standard streams of the command line, beside the consoles of `vitkit.console`.

A stream that cannot encode a character shows a similar one, and a closed pipe ends the output, never the command.
"""

import codecs
import os
import sys
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from vitkit.console import TextConsole, cell, err, out
from vitkit.errors import LINE_CHARACTERS, printable

_SIMILAR = {"→": "->", "×": "x", "…": "...", "−": "-", "–": "-", "—": "-", "·": "*", "≥": ">=", "≤": "<=", "√": "sqrt", "‖": "||"}
_BOX_LINES = {"─": "-", "━": "-", "═": "-", "╌": "-", "│": "|", "┃": "|", "║": "|", "╎": "|"}


def print_error(message: str) -> None:
    """Print an error message; each of its lines is made printable."""
    lines = [printable(line, LINE_CHARACTERS) for line in message.split("\n")]
    err.print(Text.assemble(("error:", "bold red"), " ", "\n".join(lines)))


def is_utf8() -> bool:
    """Whether the standard output can encode every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"


def prepare_streams() -> None:
    """Let both standard streams accept every text, for any encoding, and also after the reader has closed the pipe.

    A character that the encoding lacks becomes a similar one, or `?`.
    """
    Console.on_broken_pipe = _drop_output  # type: ignore[method-assign]  # rich's own handler ends the process, even during a training
    codecs.register_error("vitkit.similar", _similar)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="vitkit.similar")


def flush_streams() -> bool:
    """Flush both standard streams; False if that fails for another reason than a closed pipe."""
    written = True
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)
        except (OSError, ValueError):
            _discard(stream)
            written = False
    return written


def _drop_output(self: Console) -> None:
    _discard(self.file)


def _similar(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(map(_ascii, characters)), error.end


def _ascii(character: str) -> str:
    if "\u2500" <= character <= "\u257f":
        return _BOX_LINES.get(character, "+")
    if "\ud800" <= character <= "\udfff":
        return f"\\u{ord(character):04x}"
    return _SIMILAR.get(character, "?")


def _discard(stream: IO[Any]) -> None:
    """Redirect a stream to the null device, so that no later write fails."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # a stream in memory has no descriptor
        return


__all__ = ["TextConsole", "cell", "err", "flush_streams", "is_utf8", "out", "prepare_streams", "print_error"]
