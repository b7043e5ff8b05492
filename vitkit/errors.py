"""What can go wrong, as exceptions that a person can act on.

Every message says what was given, what was expected and what to do next. The command line prints the
message alone and leaves with `exit_code`; `--debug` adds the traceback.
"""

import difflib
from collections.abc import Iterable


class VitkitError(Exception):
    """A failure with a readable message: the command line prints it and exits with 1."""

    exit_code = 1


class UsageError(VitkitError):
    """The caller asked for something that cannot be: the command line exits with 2."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A registry was asked for a name that nothing registers."""


class AmbiguousNameError(UsageError):
    """Two distributions register one name and the caller named no distribution."""


class ArgumentsError(UsageError):
    """The arguments given to a factory do not fit its signature."""


class PluginError(VitkitError):
    """A plugin is installed but cannot be imported, or what it registers is no callable."""


class ConformanceError(VitkitError, AssertionError):
    """A registered component does not do what the contract of its kind asks."""


class RecipeError(UsageError):
    """A recipe file is missing, cannot be read, or its `main` cannot be turned into flags."""


class DatasetError(VitkitError):
    """A dataset cannot be found, downloaded or read."""


class MissingDatasetError(DatasetError):
    """A dataset is neither in the store nor could it be downloaded."""


class CheckpointError(VitkitError):
    """A saved model or a checkpoint cannot be read or does not fit."""


class MissingPluginError(CheckpointError):
    """A saved model names a component whose distribution is not installed."""


class HubError(VitkitError):
    """The Hub cannot be reached, refuses what was asked, or holds something that is not taken from it."""


class RunError(VitkitError):
    """A run cannot start, go on or be written."""


class RunDirectoryError(UsageError):
    """A run directory is in use or already holds a run."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known names nearest to `word`, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in found)}?" if found else ""
