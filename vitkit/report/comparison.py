"""Several runs: their differences, their results, and reasons why the results may not be comparable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitkit.errors import UsageError
from vitkit.report.formatting import as_float, format_difference, format_number
from vitkit.report.record import Record, Series, base_name, read_record
from vitkit.runs.directory import read_summary

MISSING = "–"
COSTS: dict[str, Literal["max", "min"] | None] = {
    "epochs": None, "parameters": None, "seconds": "min", "images_per_second": "max",
}  # fmt: skip
"""Fields of the summary shown below the metrics, with the direction in which they improve."""
CONDITIONS = ("split", "samples", "chance", "frozen", "note")
"""Fields of a protocol that have to be equal in comparable measurements."""


@dataclass(frozen=True)
class Row:
    """One result of every run: `values`, NaN where a run has none, and which of them are `best`.

    `gains` over the first run are positive where a run is better, and NaN where neither is better.
    """

    name: str
    values: list[float]
    best: list[bool]
    gains: list[float]
    unit: str = ""

    def cell(self, place: int) -> tuple[str, str]:
        """A run's value, and its difference from the first run's in brackets, or an empty text."""
        value, first = self.values[place], self.values[0]
        if COSTS.get(self.name, "max") is None and np.isfinite(value):
            return f"{value:,.0f}", ""
        text = "" if value == first else format_difference(value, first)
        return format_number(value, self.unit), f"({text})" if text else ""

    def verdict(self, place: int) -> str:
        """`better`, `worse` or an empty text: a run against the first one."""
        return "" if np.isnan(self.gains[place]) else "better" if self.gains[place] > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """Several runs with distinct names."""

    names: list[str]
    records: list[Record]

    @property
    def differences(self) -> dict[str, dict[str, list[str]]]:
        """Everything that is not the same in all runs: group → name → a text for each run."""
        records = self.records
        groups: dict[str, list[Mapping[str, Any]]] = {
            "run": [_identity(record) for record in records],
            "arguments": [record.part("arguments") for record in records],
            "settings": [{"seed": record.summary.get("seed"), **record.part("settings")} for record in records],
            "versions": [record.part("versions") for record in records],
        }
        differing = {group: _differing(mappings) for group, mappings in groups.items()}
        return {group: rows for group, rows in differing.items() if rows}

    @property
    def results(self) -> list[Row]:
        """The last values of all metrics, each beside its value on the validation split, and the costs."""
        rows = []
        for name in self._metrics:
            record = next((record for record in self.records if record.protocol(name)), self.records[0])
            values = [record.final.get(name, np.nan) for record in self.records]
            rows.append(_row(name, values, record.direction(name), record.unit(name)))
        for name, direction in COSTS.items():
            values = [as_float(record.summary.get(name)) for record in self.records]
            if np.isfinite(values).any():
                rows.append(_row(name, values, direction))
        return rows

    @property
    def warnings(self) -> list[str]:
        """Reasons why the runs' numbers may not be comparable."""
        warnings = []
        data = [str(record.part("dataset").get("name", "unknown")) for record in self.records]
        if len(set(data)) > 1:
            used = ", ".join(f"{name}: {dataset}" for name, dataset in zip(self.names, data, strict=True))
            warnings.append(f"The runs used different data ({used}): their results cannot be compared.")
        elif different := [name for name in self._metrics if not self._measured_alike(name)]:
            warnings.append(f"Not measured in the same way in all runs: {', '.join(different)}; see the reports of the runs.")
        for name, record in zip(self.names, self.records, strict=True):
            reached = max((series.epochs[-1] for series in record.metrics.values()), default=None)
            last = "it has no evaluation yet" if reached is None else f"its last evaluation is of epoch {reached:g}"
            if record.status != "finished":
                warnings.append(f"{name} has not finished ({record.status}): {last}.")
            elif reached is None:
                warnings.append(f"{name} holds no evaluation.")
        return warnings

    @property
    def columns(self) -> dict[str, list[Series | None]]:
        """The curves of each column, one for each run: metrics first, then the loss and its parts."""
        columns: dict[str, list[Series | None]] = {}
        for table in ("metrics", "losses"):
            for name in dict.fromkeys(name for record in self.records for name in getattr(record, table)):
                series = [getattr(record, table).get(name) or None for record in self.records]
                if any(series):
                    columns.setdefault(name, series)
        return columns

    @property
    def _metrics(self) -> list[str]:
        names = list(dict.fromkeys(name for record in self.records for name in record.final))
        bases = list(map(base_name, names))
        return sorted(names, key=lambda name: bases.index(base_name(name)))

    def _measured_alike(self, metric: str) -> bool:
        protocols = [record.protocol(metric) for record in self.records if record.protocol(metric)]
        conditions = [tuple(protocol.get(name) for name in CONDITIONS) for protocol in protocols]
        return all(condition == conditions[0] for condition in conditions)


def read_runs(directories: Sequence[Path]) -> Comparison:
    """Read run directories; the runs are named by the shortest ends of their paths that differ.

    Raises `UsageError` for fewer than two directories, for the same one twice, and for one that holds no run.
    """
    for directory in directories:
        _check(directory)
    paths = [directory.resolve() for directory in directories]
    if len(paths) < 2:
        raise UsageError(f"compare takes at least two runs; got {', '.join(map(str, directories)) or 'none'}")
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UsageError(f"{directories[place]} is given twice; compare takes different runs")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return Comparison(["/".join(path.parts[-depth:]) for path in paths], [read_record(directory) for directory in paths])


def _check(directory: Path) -> None:
    if not directory.exists():
        raise UsageError(f"no run at {directory}: the directory does not exist")
    if not directory.is_dir():
        raise UsageError(f"{directory} is a file; give the run's directory, {directory.parent}")
    if (directory / "summary.json").exists():
        if not read_summary(directory):
            raise UsageError(f"cannot read {directory / 'summary.json'}: it is not a run's summary")
    elif not any((directory / name).exists() for name in ("losses.csv", "metrics.csv")):
        inside = sorted(path.parent for path in directory.glob("*/summary.json"))
        hint = f"; it holds runs: {' '.join(map(str, inside[-3:]))}" if inside else ""
        raise UsageError(f"{directory} holds no run: summary.json, losses.csv and metrics.csv are missing{hint}")


def _row(name: str, values: list[float], direction: Literal["max", "min"] | None, unit: str = "") -> Row:
    finite = [value for value in values if np.isfinite(value)]
    if direction is None or not finite:
        return Row(name, values, [False] * len(values), [np.nan] * len(values), unit)
    sign = -1.0 if direction == "min" else 1.0
    best = sign * max(sign * value for value in finite)
    differ = len(finite) > 1 and min(finite) < max(finite)
    gains = [sign * (value - values[0]) or np.nan for value in values]
    return Row(name, values, [differ and value == best for value in values], gains, unit)


def _identity(record: Record) -> dict[str, Any]:
    data = record.part("dataset")
    return {
        "recipe": record.summary.get("recipe"),
        "machine": record.summary.get("machine"),
        "dataset": data.get("name"),
        "instead of": data.get("fallback_for"),
    }


def _differing(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    texts = {name: [MISSING if mapping.get(name) is None else str(mapping[name]) for mapping in mappings] for name in names}
    return {name: values for name, values in texts.items() if len(set(values)) > 1}
