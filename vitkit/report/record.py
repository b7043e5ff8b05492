"""A run as its directory tells it: the two tables, the summary, and how names and numbers are shown."""

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.errors import UsageError
from vitkit.runs.directory import read_summary

PACE = ("lr", "images_per_second")
NOT_PARTS = ("epoch", "step", "seconds", *PACE)
NOT_METRICS = ("epoch", "step", "loss")
BOUNDS = ("floor", "collapse")
"""The references that bound a statistic instead of standing beside a result."""


@dataclass(frozen=True, eq=False)
class Series:
    """A column over epochs; rows where the column is blank are left out, a written `nan` is kept."""

    epochs: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.values).any())

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Record:
    """What a run directory holds: columns of losses, `pace` (learning rate, speed) and metrics; the summary."""

    directory: Path
    losses: Mapping[str, Series]
    pace: Mapping[str, Series]
    metrics: Mapping[str, Series]
    summary: Mapping[str, Any]

    def part(self, name: str) -> Mapping[str, Any]:
        """A mapping of the summary, empty where it is missing."""
        found = self.summary.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def name(self) -> str:
        return str(self.summary.get("recipe") or self.directory.resolve().name)

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation's numbers, those of the summary where it has them."""
        last = {name: float(series.values[-1]) for name, series in self.metrics.items()}
        return {**last, **{name: number(value) for name, value in self.part("final").items()}}

    def best(self, metric: str) -> tuple[float, int] | None:
        """The best value and the epoch it was reached in."""
        found = self.part("best").get(metric)
        if not isinstance(found, Mapping) or not math.isfinite(number(found.get("value"))):
            return None
        return number(found["value"]), int(number(found.get("epoch")))

    def protocol(self, metric: str) -> Mapping[str, Any]:
        found = self.part("protocols").get(metric)
        return found if isinstance(found, Mapping) else {}

    def chance(self, metric: str) -> float | None:
        value = number(self.protocol(metric).get("chance"))
        return value if math.isfinite(value) else None

    def references(self, column: str) -> Iterator[tuple[str, float]]:
        """The lines to compare a column with: label and value."""
        for label, lines in self.part("references").items():
            if label not in BOUNDS and isinstance(lines, Mapping) and math.isfinite(number(lines.get(column))):
                yield str(label), number(lines[column])

    def bound(self, which: str, column: str) -> float | None:
        """The floor or the collapse line of a statistic."""
        lines = self.part("references").get(which)
        value = number(lines.get(column)) if isinstance(lines, Mapping) else math.nan
        return value if math.isfinite(value) else None


def read_record(directory: Path) -> Record:
    """Read a run directory; files that are not there (yet) leave their part empty.

    Raises `UsageError` where a table is there and cannot be read.
    """
    losses, metrics = _read_table(directory / "losses.csv"), _read_table(directory / "metrics.csv")
    return Record(
        directory=directory,
        losses={name: series for name, series in losses.items() if name not in NOT_PARTS},
        pace={name: series for name, series in losses.items() if name in PACE},
        metrics={name: series for name, series in metrics.items() if name not in NOT_METRICS},
        summary=read_summary(directory),
    )


def _read_table(path: Path) -> dict[str, Series]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = [name for name in reader.fieldnames or () if name]
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}; expected the table that a run writes") from error
    table = {}
    for name in columns:
        written = [(_epoch(row, place), number(row[name])) for place, row in enumerate(rows, 1) if row.get(name)]
        if written:
            epochs, values = zip(*written, strict=True)
            table[name] = Series(np.array(epochs), np.array(values))
    return table


def _epoch(row: Mapping[str, str], place: int) -> float:
    epoch = number(row.get("epoch"))
    return epoch if math.isfinite(epoch) else float(place)


def number(value: Any) -> float:
    """Anything as a float; what is no number is NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def split_topk(name: str) -> tuple[str, int] | None:
    """`m1_top3` → `("m1", 3)`; None for a name that says no k."""
    found = re.fullmatch(r"(.+?)_?top_?(\d+)", name)
    return (found[1], int(found[2])) if found else None


def pretty(name: str) -> str:
    """`m1_top3` → `M1 top-3`, `linear_top1` → `linear top-1`."""
    name = re.sub(r"_?\btop_?(\d+)$|_top_?(\d+)$", lambda found: f" top-{found[1] or found[2]}", name)
    return re.sub(r"\b[a-z]\d\b", lambda found: found[0].upper(), name.replace("_", " ").strip())


def shown(value: float | None) -> str:
    """A number with the digits that matter."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:,.{_digits(size)}f}"


def difference(value: float, first: float) -> str:
    """`value − first` with its sign, and with as many digits as the two are shown with."""
    size = max(abs(value), abs(first))
    if not math.isfinite(value - first):
        return ""
    told = shown(abs(value - first)) if size < 1e-3 or size >= 1e6 else f"{abs(value - first):,.{_digits(size)}f}"
    return f"{'+' if value >= first else '−'}{told}"


def _digits(size: float) -> int:
    return 4 if size < 10 else 2 if size < 1000 else 0


def plain(value: float | None) -> str:
    """A given number, such as a chance level, without digits that say nothing."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{round(value, 4):g}"


def duration(seconds: float) -> str:
    """`4 min 5 s`."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def standard_error(metric: str, value: float, samples: Any) -> float | None:
    """√(p(1−p)/n) of an accuracy p over n samples; None for what is no accuracy."""
    n = number(samples)
    if split_topk(metric) is None or not n >= 1 or not 0 <= value <= 1:
        return None
    return math.sqrt(value * (1 - value) / n)
