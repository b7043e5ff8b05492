"""Schedules as plain functions: `schedule(step, total)` is a value at step 0 ≤ step < total.

Use them for the momentum of a teacher, a temperature or weight decay: `MomentumTeacher(model, cosine(0.996, 1.0))`,
`run.fit(..., weight_decay=cosine(0.04, 0.4))`, or a loss with a method `set_step(step, total)`. For learning rates use torch's
`LRScheduler`s, see `warmup_cosine`.
"""

import math
from collections.abc import Callable

from vitkit.validation import at_least

Schedule = Callable[[int, int], float]


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step, total: value


def linear(start: float, end: float, *, warmup: int | None = None) -> Schedule:
    """start + (end − start)·min(t / T, 1), where T is the total number of steps, or `warmup`; after T steps the value is `end`.

    Raises `UsageError` for a warm-up below 1 step.
    """
    at_least(1, warmup=warmup)
    return lambda step, total: start + (end - start) * _share(step, total if warmup is None else warmup)


def cosine(start: float, end: float) -> Schedule:
    """end + (start − end)·(1 + cos(π·t / T)) / 2, where T is the total number of steps (BYOL and DINO: momentum, weight decay)."""
    return lambda step, total: end + (start - end) * (1.0 + math.cos(math.pi * _share(step, total))) / 2.0


def _share(step: int, total: int) -> float:
    return min(step / max(total, 1), 1.0)


__all__ = ["Schedule", "constant", "cosine", "linear"]
