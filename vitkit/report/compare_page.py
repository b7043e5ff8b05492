"""Runs side by side: one page, and one image with the curves of all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitkit.errors import UsageError
from vitkit.files import atomic_write, write_text
from vitkit.report.comparison import Comparison
from vitkit.report.curves import CHANCE, draw, fit_axes
from vitkit.report.formatting import format_constant, format_number, title_of
from vitkit.report.record import Series
from vitkit.report.style import MUTED, PALETTE, Plot, drawable, house_style, legend_below, panels, png
from vitkit.report.templating import Banner, PlotImage, render

STYLES = ("-", "--", "-.", ":")
MARK = "vitkit compare"
"""A mark in every page and image that this module writes; without `overwrite` only marked files are replaced."""
HEAD_BYTES = 1024


def write_comparison(comparison: Comparison, page: Path, *, overwrite: bool = False) -> Path:
    """Write the page and, beside it under the same name, a PNG with the curves of all runs; return the PNG's path.

    Files that an earlier comparison wrote are replaced. Raises `UsageError` for other existing files without `overwrite`,
    and `RunError` if they cannot be written.
    """
    sheet = page.with_suffix(".png")
    for path in (page, sheet):
        if not overwrite and path.exists() and MARK.encode() not in _head(path):
            raise UsageError(
                f"{path} exists and was not written by vitkit compare; choose another --out, or give --overwrite to replace it"
            )
    images = []
    columns = comparison.columns
    with house_style():
        if columns:
            data = png(_sheet(comparison, columns), software=MARK)
            with atomic_write(sheet) as temporary:
                temporary.write_bytes(data)
        for name, series in columns.items():
            plot = _single(comparison, name, series)
            images.append(PlotImage(plot, png(plot.figure)))
    rows = [
        {"title": title_of(row.name), "cells": [(*row.cell(i), row.best[i], row.verdict(i)) for i in range(len(row.values))]}
        for row in comparison.results
    ]
    text = render(
        "compare.html.j2",
        names=comparison.names,
        statuses=[record.status for record in comparison.records],
        results=rows,
        warnings=Banner("warning", "Before you compare", tuple(comparison.warnings)) if comparison.warnings else None,
        differences=[pair for group in comparison.differences.values() for pair in group.items()],
        images=images,
    )
    write_text(page, text)
    return sheet


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _single(comparison: Comparison, name: str, series: Sequence[Series | None]) -> Plot:
    figure, (axis,) = panels(1)
    lines = _lines(axis, comparison, name, series)
    last = [f"{run} {format_number(column.last)}" for run, column in zip(comparison.names, series, strict=True) if column]
    legend_below(axis, lines, last, columns=2 if max(map(len, last)) < 30 else 1)
    return Plot(name, title_of(name), figure, f"{title_of(name)} over epochs, last values: {', '.join(last)}.")


def _sheet(comparison: Comparison, columns: Mapping[str, Sequence[Series | None]]) -> Figure:
    figure, axes = panels(len(columns))
    for axis, (name, series) in zip(axes, columns.items(), strict=True):
        _lines(axis, comparison, name, series)
        axis.set_title(drawable(title_of(name), 36))
    handles = [Line2D([], [], **_look(place)) for place in range(len(comparison.names))]
    names = [drawable(name, 48) for name in comparison.names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3))
    return figure


def _lines(axis: Axes, comparison: Comparison, name: str, series: Sequence[Series | None]) -> list[Line2D]:
    present = [column for column in series if column]
    handles = [draw(axis, column, **_look(place)) for place, column in enumerate(series) if column]
    values = np.concatenate([column.finite for column in present])
    lines = [("chance", record.chance(name)) for record in comparison.records]
    lines += [("uninformed", record.bound("uninformed", name)) for record in comparison.records]
    for label, value in dict.fromkeys(lines):
        # A line far away from the curves would make their differences invisible.
        if value is not None and values.min() - np.ptp(values) <= value <= values.max() + np.ptp(values):
            axis.axhline(value, color=MUTED, linestyle=CHANCE, linewidth=1.0)
            axis.annotate(
                f"{label} {format_constant(value)}", (0.99, value), xycoords=("axes fraction", "data"),
                ha="right", va="bottom", fontsize=7.5, color=MUTED,
            )  # fmt: skip
    fit_axes(axis, present)
    return handles


def _look(place: int) -> dict[str, Any]:
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": STYLES[place // len(PALETTE) % len(STYLES)]}
