"""The format of names and numbers on pages, in figures and on the terminal."""

import math
import re
from typing import Any


def as_float(value: Any) -> float:
    """Any value as a float; NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def split_topk(name: str) -> tuple[str, int] | None:
    """`m1_top3` → `("m1", 3)`; None for a name without a k."""
    match = re.fullmatch(r"(.+?)_?top_?(\d+)", name)
    return (match[1], int(match[2])) if match else None


def title_of(name: str) -> str:
    """`m1_top3` → `M1 top-3`, `val_linear_top1` → `linear top-1 (validation)`."""
    if name.startswith("val_"):
        return f"{title_of(name.removeprefix('val_'))} (validation)"
    name = re.sub(r"_?\btop_?(\d+)$|_top_?(\d+)$", lambda match: f" top-{match[1] or match[2]}", name)
    return re.sub(r"\b[a-z]\d\b", lambda match: match[0].upper(), name.replace("_", " ").strip())


def format_number(value: float | None, unit: str = "") -> str:
    """A measured number with the digits that matter, and its unit."""
    if value is None or math.isnan(value):
        return "–"
    size = abs(value)
    if math.isinf(value):
        text = "∞" if value > 0 else "−∞"
    elif size and (size < 1e-3 or size >= 1e6):
        text = f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")
    else:
        text = f"{value:,.{_digits(size)}f}"
    return f"{text} {unit}" if unit else text


def format_difference(value: float, first: float) -> str:
    """`value − first` with its sign, and with as many digits as the two numbers are written with."""
    if not math.isfinite(value - first):
        return ""
    size = max(abs(value), abs(first))
    text = format_number(abs(value - first)) if size < 1e-3 or size >= 1e6 else f"{abs(value - first):,.{_digits(size)}f}"
    return f"{'+' if value >= first else '−'}{text}"


def _digits(size: float) -> int:
    return 4 if size < 10 else 2 if size < 1000 else 0


def format_constant(value: float | None) -> str:
    """A number that was not measured here, such as a chance level, without trailing zeros."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{round(value, 4):g}"


