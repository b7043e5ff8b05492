"""Runs side by side: what differs between them, what came out, and their curves in one picture per column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from vitkit.errors import UsageError
from vitkit.files import atomic_write, write_text
from vitkit.report import html
from vitkit.report.curves import are_shares, draw, fit_axes
from vitkit.report.record import Record, Series, difference, lower_is_better, number, plain, pretty, read_record, shown
from vitkit.report.style import MUTED, PALETTE, Plot, drawable, house_style, legend_below, panels, png

MISSING = "–"
STYLES = ("-", "--", "-.", ":")
COUNTS = ("parameters", "epochs")


@dataclass(frozen=True)
class Row:
    """A result of every run: `values` (NaN where a run has none), which of them are `best`, and what each `gains`
    over the first run: positive where it is better; NaN where that cannot be said."""

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
        top = [{key: record.summary.get(key) for key in ("recipe", "machine")} for record in self.records]
        data = [{"dataset": record.part("dataset").get("name"), "instead of": record.part("dataset").get("fallback_for")}
                for record in self.records]  # fmt: skip
        settings = [{"seed": record.summary.get("seed"), **record.part("settings")} for record in self.records]
        groups: dict[str, Sequence[Mapping[str, Any]]] = {
            "run": [one | two for one, two in zip(top, data, strict=True)],
            "arguments": [record.part("arguments") for record in self.records],
            "settings": settings,
            "versions": [record.part("versions") for record in self.records],
        }
        found = {group: _differing(mappings) for group, mappings in groups.items()}
        return {group: rows for group, rows in found.items() if rows}

    @property
    def results(self) -> list[Row]:
        """Last values of all metrics, and what they cost."""
        names = list(dict.fromkeys(name for record in self.records for name in record.final))
        rows = [_row(name, [record.final.get(name, np.nan) for record in self.records]) for name in names]
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
            found.append(f"The runs used different data ({_each(self.names, data)}): their results cannot be compared.")
        for name, record in zip(self.names, self.records, strict=True):
            status = record.summary.get("status", "unknown")
            if status != "finished":
                epochs = [series.epochs[-1] for series in record.metrics.values()]
                last = f"its last evaluation is that of epoch {max(epochs):g}" if epochs else "it has no evaluation yet"
                found.append(f"{name} has not finished ({status}): {last}.")
            elif not record.metrics:
                found.append(f"{name} holds no evaluations.")
        for metric in dict.fromkeys(metric for record in self.records for metric in record.part("protocols")):
            told = [{k: v for k, v in record.protocol(metric).items() if k != "note"} for record in self.records]
            if any(one != two for one in told for two in told if one and two):
                found.append(f"{metric} was not measured in the same way in all runs; their own reports say how.")
        return found

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
    return Comparison(["/".join(directory.parts[-depth:]) for directory in whole], [read_record(path) for path in whole])


def _check(directory: Path) -> None:
    if not directory.exists():
        raise UsageError(f"no run at {directory}: there is no such directory")
    if not directory.is_dir():
        raise UsageError(f"{directory} is a file; give the run's directory, {directory.parent}")
    if (directory / "summary.json").exists():
        if not read_record(directory).summary:
            raise UsageError(f"cannot read {directory / 'summary.json'}: it is not a run's summary")
    elif not any((directory / name).exists() for name in ("losses.csv", "metrics.csv")):
        inside = sorted(path.parent for path in directory.glob("*/summary.json"))
        hint = f"; it holds runs: {' '.join(map(str, inside[-3:]))}" if inside else ""
        raise UsageError(f"{directory} holds no run: summary.json, losses.csv and metrics.csv are missing{hint}")


def write_comparison(comparison: Comparison, page: Path) -> Path:
    """Write the page and, beside it under the same name, a PNG with the curves of all runs; the PNG's path.

    Raises `RunError` where they cannot be written.
    """
    sheet = page.with_suffix(".png")
    figures = []
    columns = comparison.columns
    with house_style():
        if columns:
            data = png(_sheet(comparison, columns).figure)
            with atomic_write(sheet) as temporary:
                temporary.write_bytes(data)
        for name, series in columns.items():
            plot = _single(comparison, name, series)
            figures.append(html.picture(plot, png(plot.figure)))
    write_text(page, _page(comparison, figures))
    return sheet


def _single(comparison: Comparison, name: str, series: Sequence[Series | None]) -> Plot:
    figure, (axis,) = panels(1)
    lines = _lines(axis, comparison, name, series)
    told = [f"{run} {shown(float(column.finite[-1]))}" for run, column in zip(comparison.names, series, strict=True) if column]
    legend_below(axis, lines, told, columns=2 if max(map(len, told)) < 30 else 1)
    return Plot(name, pretty(name), figure, f"{pretty(name)} over epochs, last values: {', '.join(told)}.")


def _sheet(comparison: Comparison, columns: Mapping[str, Sequence[Series | None]]) -> Plot:
    figure, axes = panels(len(columns))
    for axis, (name, series) in zip(axes, columns.items(), strict=True):
        _lines(axis, comparison, name, series)
        axis.set_title(drawable(pretty(name), 36))
    handles = [Line2D([], [], **_look(place)) for place in range(len(comparison.names))]
    names = [drawable(name, 48) for name in comparison.names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3))
    return Plot("compare", "All curves", figure, "")


def _lines(axis: Axes, comparison: Comparison, name: str, series: Sequence[Series | None]) -> list[Line2D]:
    present = [column for column in series if column]
    handles = [draw(axis, column, **_look(place)) for place, column in enumerate(series) if column]
    chances = {chance for record in comparison.records if (chance := record.chance(name)) is not None}
    for chance in chances:
        axis.axhline(chance, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
        axis.annotate(f"chance {plain(chance)}", (0.99, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=7.5, color=MUTED)  # fmt: skip
    shares = bool(chances) and are_shares([*chances, *(value for column in present for value in column.finite)])
    fit_axes(axis, present, shares=shares)
    return handles


def _look(place: int) -> dict[str, Any]:
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": STYLES[place // len(PALETTE) % len(STYLES)]}


def _page(comparison: Comparison, figures: Sequence[html.Html]) -> str:
    names, element = comparison.names, html.element
    head = ["", *names]
    status = ["status", *(html.status_chip(record) for record in comparison.records)]
    results = [status, *([pretty(row.name), *(_cell(row, place) for place in range(len(names)))] for row in comparison.results)]
    differences = [[element("code", name), *values] for rows in comparison.differences.values() for name, values in rows.items()]
    body = [
        element("header", element("h1", "Runs compared"), element("p", " · ".join(names), class_="facts")),
        html.banner("warning", "Before you compare", *comparison.warnings) if comparison.warnings else "",
        element("section", element("h2", "Results"), html.table(head, results, "Last evaluations, and what they cost"),
                element("p", f"In brackets: the difference from {names[0]}. Bold: the best of a row.", class_="muted")),
        element("section", element("h2", "What differs"),
                html.table(head, differences, "Arguments, settings and versions that are not the same in all runs")
                if differences else element("p", "No argument, setting or version differs.")),
        element("section", element("h2", "Curves"), element("div", *figures, class_="figures")) if figures else "",
    ]  # fmt: skip
    return html.document("Runs compared · vitkit", html.join((piece for piece in body if piece), "\n"))


def _cell(row: Row, place: int) -> html.Html:
    value, against = row.cell(place)
    kind = None if not np.isfinite(row.gains[place]) else "better" if row.gains[place] > 0 else "worse"
    shown_value = html.element("b", value) if row.best[place] else html.text(value)
    return html.join([shown_value, html.element("span", against, class_=kind)] if against else [shown_value], " ")


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


def _differing(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    told = {name: [_told(mapping.get(name)) for mapping in mappings] for name in names}
    return {name: values for name, values in told.items() if len(set(values)) > 1}


def _told(value: Any) -> str:
    return MISSING if value is None else str(value)


def _each(names: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
