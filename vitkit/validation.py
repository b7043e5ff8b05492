"""Checks of arguments: each raises `UsageError` with the name, the given and the expected value.

They take values by keyword, so that a message contains the name of the argument:

    at_least(1, batch_size=batch_size, epochs=epochs)
    in_range(0, 1, dropout=dropout, low_included=True)
"""

import math
from collections.abc import Iterable
from typing import Any

from vitkit.errors import UsageError, nearest


def at_least(least: int | float, **values: int | float | None) -> None:
    """Each value is finite and at least `least`. None passes: it means that the argument was not given."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UsageError(f"{name} is {value}; expected at least {least}")


def positive(**values: float | None) -> None:
    """Each value is finite and above zero. None passes."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value}; expected a finite positive number")


def in_range(
    low: float, high: float, *, low_included: bool = True, high_included: bool = True, **values: float | None
) -> None:
    """Each value lies between `low` and `high`, with or without the ends. None passes."""
    interval = f"{'[' if low_included else '('}{low:g}, {high:g}{']' if high_included else ')'}"
    for name, value in values.items():
        if value is None:
            continue
        above = value >= low if low_included else value > low
        below = value <= high if high_included else value < high
        if not (above and below):
            raise UsageError(f"{name} is {value}; expected a number in {interval}")


def one_of(choices: Iterable[Any], **values: Any) -> None:
    """Each value is one of `choices`."""
    allowed = list(choices)
    for name, value in values.items():
        if value not in allowed:
            near = nearest(str(value), [str(choice) for choice in allowed])
            raise UsageError(f"{name} is {value!r}{near or ';'} expected {', '.join(map(repr, allowed))}")


__all__ = ["at_least", "in_range", "one_of", "positive"]
