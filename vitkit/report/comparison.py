"""Several runs: what differs between them, what came out, and why that may not be comparable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.errors import UsageError
from vitkit.report.record import Record, Series, difference, number, read_record, shown
from vitkit.runs.directory import read_summary
from vitkit.runs.summary import lower_is_better

MISSING = "–"
COUNTS = ("parameters", "epochs")


@dataclass(frozen=True)
class Row:
    """One result of every run: `values`, NaN where a run has none, and which of them are `best`.

    `gains` over the first run are positive where a run is better, NaN where that cannot be said.
    """

    name: str
    values: list[float]
    best: list[bool]
    gains: list[float]

    def cell(self, place: int) -> tuple[str, str]:
        """A run's value, and its difference from the first run's in brackets or an empty text."""
        value, first = self.values[place], self.values[0]
        if self.name in COUNTS and np.isfinite(value):
            return f"{value:,.0f}", ""
        told = "" if value == first else difference(value, first)
        return shown(value), f"({told})" if told else ""


@dataclass(frozen=True)
class Comparison:
    """Several runs, each with a name of its own."""

    names: list[str]
    records: list[Record]

    @property
    def differences(self) -> dict[str, dict[str, list[str]]]:
        """What differs: group → name → a text for each run."""
        records = self.records
        groups: dict[str, list[Mapping[str, Any]]] = {
            "run": [_identity(record) for record in records],
            "arguments": [record.part("arguments") for record in records],
            "settings": [{"seed": record.summary.get("seed"), **record.part("settings")} for record in records],
            "versions": [record.part("versions") for record in records],
        }
        found = {group: _differing(mappings) for group, mappings in groups.items()}
        return {group: rows for group, rows in found.items() if rows}

    @property
    def results(self) -> list[Row]:
        """Last values of all metrics, and what they cost."""
        rows = [_row(name, [record.final.get(name, np.nan) for record in self.records]) for name in self._metrics]
        for name in ("epochs", "parameters", "seconds", "images_per_second"):
            values = [number(record.summary.get(name)) for record in self.records]
            if np.isfinite(values).any():
                rows.append(_row(name, values))
        return rows

    @property
    def warnings(self) -> list[str]:
        """Why the runs' numbers may not be comparable."""
        found = []
        data = [str(record.part("dataset").get("name", "unknown")) for record in self.records]
        if len(set(data)) > 1:
            told = ", ".join(f"{name}: {used}" for name, used in zip(self.names, data, strict=True))
            found.append(f"The runs used different data ({told}): their results cannot be compared.")
        elif unlike := [name for name in self._metrics if not self._measured_alike(name)]:
            found.append(f"Not measured in the same way in all runs: {', '.join(unlike)}; their reports say how.")
        for name, record in zip(self.names, self.records, strict=True):
            status = record.summary.get("status", "unknown")
            reached = max((series.epochs[-1] for series in record.metrics.values()), default=None)
            last = "it has no evaluation yet" if reached is None else f"its last evaluation is of epoch {reached:g}"
            if status != "finished":
                found.append(f"{name} has not finished ({status}): {last}.")
            elif reached is None:
                found.append(f"{name} holds no evaluation.")
        return found

    @property
    def _metrics(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records for name in record.final))

    def _measured_alike(self, metric: str) -> bool:
        protocols = [record.protocol(metric) for record in self.records if record.protocol(metric)]
        return all(protocol == protocols[0] for protocol in protocols)

    @property
    def columns(self) -> dict[str, list[Series | None]]:
        """The curves: metrics first, then the loss and its parts."""
        columns: dict[str, list[Series | None]] = {}
        for table in ("metrics", "losses"):
            for name in dict.fromkeys(name for record in self.records for name in getattr(record, table)):
                series = [getattr(record, table).get(name) or None for record in self.records]
                if any(series):
                    columns.setdefault(name, series)
        return columns


def read_runs(directories: Sequence[Path]) -> Comparison:
    """Read run directories; names are the shortest ends of their paths that differ.

    Raises `UsageError` for fewer than two, for one given twice and for a directory that holds no run.
    """
    for directory in directories:
        _check(directory)
    whole = [directory.resolve() for directory in directories]
    if len(whole) < 2:
        raise UsageError(f"compare takes at least two runs; got {', '.join(map(str, directories)) or 'none'}")
    for place, directory in enumerate(whole):
        if directory in whole[:place]:
            raise UsageError(f"{directories[place]} is given twice; compare takes different runs")
    depth = 1
    while len({directory.parts[-depth:] for directory in whole}) < len(whole):
        depth += 1
    names = ["/".join(directory.parts[-depth:]) for directory in whole]
    return Comparison(names, [read_record(directory) for directory in whole])


def _check(directory: Path) -> None:
    if not directory.exists():
        raise UsageError(f"no run at {directory}: there is no such directory")
    if not directory.is_dir():
        raise UsageError(f"{directory} is a file; give the run's directory, {directory.parent}")
    if (directory / "summary.json").exists():
        if not read_summary(directory):
            raise UsageError(f"cannot read {directory / 'summary.json'}: it is not a run's summary")
    elif not any((directory / name).exists() for name in ("losses.csv", "metrics.csv")):
        inside = sorted(path.parent for path in directory.glob("*/summary.json"))
        hint = f"; it holds runs: {' '.join(map(str, inside[-3:]))}" if inside else ""
        raise UsageError(f"{directory} holds no run: summary.json, losses.csv and metrics.csv are missing{hint}")


def _row(name: str, values: Sequence[float]) -> Row:
    values = [float(value) for value in values]
    finite = [value for value in values if np.isfinite(value)]
    if name in COUNTS or not finite:
        return Row(name, values, [False] * len(values), [np.nan] * len(values))
    sign = -1.0 if lower_is_better(name) else 1.0
    best = sign * max(sign * value for value in finite)
    tell = len(finite) > 1 and min(finite) < max(finite)
    gains = [sign * (value - values[0]) or np.nan for value in values]
    return Row(name, values, [tell and value == best for value in values], gains)


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
    told = {name: [_told(mapping.get(name)) for mapping in mappings] for name in names}
    return {name: values for name, values in told.items() if len(set(values)) > 1}


def _told(value: Any) -> str:
    return MISSING if value is None else str(value)
