"""The record of a run in its directory: two tables and the summary."""

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitkit.errors import UsageError
from vitkit.report.formatting import as_float
from vitkit.runs.directory import read_summary, status_of
from vitkit.runs.summary import direction

PACE = ("lr", "images_per_second")
NOT_PARTS = ("epoch", "step", "seconds", *PACE)
NOT_METRICS = ("epoch", "step", "loss")
BOUNDS = ("floor", "collapse", "uninformed")
"""References that are properties of a loss; the others are results to compare with."""


@dataclass(frozen=True, eq=False)
class Series:
    """A column over epochs `(n,)`; rows in which the column is blank are left out, a written `nan` is kept."""

    epochs: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.values).any())

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]

    @property
    def last(self) -> float:
        """The last finite value."""
        return float(self.finite[-1])


@dataclass(frozen=True)
class Record:
    """The content of a run directory: columns of losses, `pace` (learning rate, speed) and metrics, and the summary."""

    directory: Path
    losses: Mapping[str, Series]
    pace: Mapping[str, Series]
    metrics: Mapping[str, Series]
    summary: Mapping[str, Any]

    def part(self, name: str) -> Mapping[str, Any]:
        """A mapping in the summary, empty if it is missing."""
        part = self.summary.get(name)
        return part if isinstance(part, Mapping) else {}

    @property
    def name(self) -> str:
        return str(self.summary.get("recipe") or self.directory.resolve().name)

    @cached_property
    def status(self) -> str:
        """`finished`, `interrupted`, `failed`, `running`, `stopped` (the process disappeared) or `unknown`."""
        return status_of(self.directory, self.summary)

    @property
    def final(self) -> dict[str, float]:
        """The values of the last evaluation; those of the summary take precedence."""
        last = {name: float(series.values[-1]) for name, series in self.metrics.items()}
        return {**last, **{str(name): as_float(value) for name, value in self.part("final").items()}}

    def best(self, metric: str) -> tuple[float, int] | None:
        """The best value and its epoch."""
        best = self.part("best").get(metric)
        if not isinstance(best, Mapping) or not math.isfinite(as_float(best.get("value")) + as_float(best.get("epoch"))):
            return None
        return as_float(best["value"]), int(as_float(best["epoch"]))

    def protocol(self, metric: str) -> Mapping[str, Any]:
        protocol = self.part("protocols").get(metric)
        return protocol if isinstance(protocol, Mapping) else {}

    def direction(self, metric: str) -> Literal["max", "min"]:
        """The direction in which the metric improves."""
        return direction(metric, self.part("protocols"))

    def is_proportion(self, metric: str) -> bool:
        return self.protocol(metric).get("kind") == "proportion"

    def unit(self, metric: str) -> str:
        return str(self.protocol(metric).get("unit") or "")

    def split(self, metric: str) -> str:
        """The split that a metric was measured on, empty if it is not recorded; the loss is one of training."""
        return str(self.protocol(metric).get("split") or ("train" if metric == "loss" else ""))

    def chance(self, metric: str) -> float | None:
        return _finite(self.protocol(metric).get("chance"))

    def untrained(self, metric: str) -> float | None:
        """The value of the network before training."""
        return _finite(self.protocol(metric).get("untrained"))

    def standard_error(self, metric: str) -> float | None:
        """√(p(1−p)/n) of a proportion p over n samples; None for other metrics."""
        value, samples = self.final.get(metric, math.nan), as_float(self.protocol(metric).get("samples"))
        if not self.is_proportion(metric) or not samples >= 1 or not 0 <= value <= 1:
            return None
        return math.sqrt(value * (1 - value) / samples)

    def references(self, metric: str) -> Iterator[tuple[str, float]]:
        """Results to compare a metric with: label and value."""
        for label, lines in self.part("references").items():
            if label not in BOUNDS and isinstance(lines, Mapping) and (value := _finite(lines.get(metric))) is not None:
                yield str(label), value

    def bound(self, label: str, column: str) -> float | None:
        """The value of a loss or of one of its parts at its floor, after a collapse, or for an uninformed prediction."""
        lines = self.part("references").get(label)
        return _finite(lines.get(column)) if isinstance(lines, Mapping) else None


def base_name(metric: str) -> str:
    """The name without the prefix of the validation split: `val_knn_top1` → `knn_top1`."""
    return metric.removeprefix("val_")


def _finite(value: Any) -> float | None:
    number = as_float(value)
    return number if math.isfinite(number) else None


def read_record(directory: Path) -> Record:
    """Read a run directory; a file that does not exist (yet) leaves its part empty.

    Raises `UsageError` for a table that cannot be read.
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
        written = [(_epoch(row, place), as_float(row[name])) for place, row in enumerate(rows, 1) if row.get(name)]
        if written:
            epochs, values = zip(*written, strict=True)
            table[name] = Series(np.array(epochs), np.array(values))
    return table


def _epoch(row: Mapping[str, str], place: int) -> float:
    epoch = as_float(row.get("epoch"))
    return epoch if math.isfinite(epoch) else float(place)
