"""Exceptions with messages that a person can act on, and the function that makes foreign text safe to print.

Every message says what was given, what was expected and what to do next. The command line prints the message and exits with
`exit_code`; `--debug` adds the traceback.
"""

import difflib
import shlex
import unicodedata
from collections.abc import Iterable


class VitkitError(Exception):
    """A failure with a readable message: the command line prints it and exits with 1."""

    exit_code = 1


class UsageError(VitkitError):
    """The caller gave an argument that is not valid: the command line exits with 2."""

    exit_code = 2


class UnknownNameError(UsageError):
    """No plugin registers the name that a registry was asked for."""


class AmbiguousNameError(UsageError):
    """Two distributions register the same name, and the caller named no distribution."""


class ArgumentsError(UsageError):
    """The arguments given to a factory do not fit its signature."""


class PluginError(VitkitError):
    """An installed plugin cannot be imported, or it registers something that is not callable."""


class ConformanceError(VitkitError, AssertionError):
    """A registered component does not follow the contract of its kind."""


class RecipeError(UsageError):
    """A recipe file is missing or unreadable, or the arguments of its `main` do not give flags."""


class DatasetError(VitkitError):
    """A dataset cannot be found, downloaded or read."""


class MissingDatasetError(DatasetError):
    """A dataset is not in the store, and it could not be downloaded."""


class CheckpointError(VitkitError):
    """A saved model or a checkpoint cannot be read or does not fit."""


class MissingPluginError(CheckpointError):
    """A saved model names a component whose distribution is not installed."""


class HubError(VitkitError):
    """The Hub is not reachable, refuses the request, or holds a file that vitkit does not accept."""


class RunError(VitkitError):
    """A run cannot start, continue or write its files."""


class RunDirectoryError(UsageError):
    """A run directory is in use or already holds a run."""


LINE_CHARACTERS = 4000
"""Length at which a complete line of a message or a log is cut."""
JOINERS = "\u200c\u200d"
"""Zero-width characters that Persian text and emoji need; they move nothing on the screen."""


def printable(text: object, limit: int = 300) -> str:
    """Return `text` as one line that is safe to print. Every foreign string passes through it before it is printed or logged.

    Line breaks and tabs become spaces. Control characters, bidirectional overrides, invisible characters and undecodable bytes of
    file names become visible escapes such as `\\x1b`. Text longer than `limit` characters is cut, and ends with `…`.
    Square brackets stay: print with `markup=False` or as `rich.text.Text`.
    """
    try:
        words = str(text)
    except Exception as error:  # the text of a plugin's exception is the plugin's code
        words = f"<{type(text).__name__} without text: {type(error).__name__}>"
    if len(words) > limit:
        words = words[: max(0, limit - 1)] + "…"
    return "".join(map(_visible, words))


def _visible(character: str) -> str:
    if " " <= character <= "~" or character in JOINERS:
        return character
    if character in "\t\n\r\v\f\x85\u2028\u2029":
        return " "
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co"):
        return character.encode("unicode_escape").decode("ascii")
    return character


def shell_command(*words: object) -> str:
    """A command that a person may paste into a shell: every word is printable and quoted."""
    return shlex.join(printable(word) for word in words)


def nearest(word: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the names nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in matches)}?" if matches else ""
