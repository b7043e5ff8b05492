"""Runs side by side: one page, and one picture with the curves of all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitkit.files import atomic_write, write_text
from vitkit.report import html
from vitkit.report.comparison import Comparison, Row
from vitkit.report.curves import draw, fit_axes
from vitkit.report.record import Series, plain, pretty, shown
from vitkit.report.style import MUTED, PALETTE, Plot, drawable, house_style, legend_below, panels, png

STYLES = ("-", "--", "-.", ":")


def write_comparison(comparison: Comparison, page: Path) -> Path:
    """Write the page and, beside it under the same name, a PNG with the curves of all runs; the PNG's path.

    Raises `RunError` where they cannot be written.
    """
    sheet = page.with_suffix(".png")
    figures = []
    columns = comparison.columns
    with house_style():
        if columns:
            data = png(_sheet(comparison, columns))
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
    told = [
        f"{run} {shown(float(column.finite[-1]))}"
        for run, column in zip(comparison.names, series, strict=True)
        if column
    ]
    legend_below(axis, lines, told, columns=2 if max(map(len, told)) < 30 else 1)
    return Plot(name, pretty(name), figure, f"{pretty(name)} over epochs, last values: {', '.join(told)}.")


def _sheet(comparison: Comparison, columns: Mapping[str, Sequence[Series | None]]) -> Figure:
    figure, axes = panels(len(columns))
    for axis, (name, series) in zip(axes, columns.items(), strict=True):
        _lines(axis, comparison, name, series)
        axis.set_title(drawable(pretty(name), 36))
    handles = [Line2D([], [], **_look(place)) for place in range(len(comparison.names))]
    names = [drawable(name, 48) for name in comparison.names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3))
    return figure


def _lines(axis: Axes, comparison: Comparison, name: str, series: Sequence[Series | None]) -> list[Line2D]:
    present = [column for column in series if column]
    handles = [draw(axis, column, **_look(place)) for place, column in enumerate(series) if column]
    values = np.concatenate([column.finite for column in present])
    for chance in {chance for record in comparison.records if (chance := record.chance(name)) is not None}:
        # The curves' differences are the point here: a chance level far away from them would press them flat.
        if values.min() - np.ptp(values) <= chance <= values.max() + np.ptp(values):
            axis.axhline(chance, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
            axis.annotate(
                f"chance {plain(chance)}",
                (0.99, chance),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7.5,
                color=MUTED,
            )
    fit_axes(axis, present)
    return handles


def _look(place: int) -> dict[str, Any]:
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": STYLES[place // len(PALETTE) % len(STYLES)]}


def _page(comparison: Comparison, figures: Sequence[html.Html]) -> str:
    names, element = comparison.names, html.element
    status = ["status", *(html.status_chip(record) for record in comparison.records)]
    results = [status]
    for row in comparison.results:
        results.append([pretty(row.name), *(_cell(row, place) for place in range(len(names)))])
    groups = comparison.differences.values()
    differing = [[element("code", name), *values] for rows in groups for name, values in rows.items()]
    told = "Arguments, settings and versions that are not the same in all runs"
    legend = f"In brackets: the difference from {names[0]}. Bold: the best of a row."
    body = [
        element("header", element("h1", "Runs compared"), element("p", " · ".join(names), class_="facts")),
        html.banner("warning", "Before you compare", *comparison.warnings) if comparison.warnings else "",
        element(
            "section",
            element("h2", "Results"),
            html.table(["", *names], results, "Last evaluations, and what they cost"),
            element("p", legend, class_="muted"),
        ),
        element(
            "section",
            element("h2", "What differs"),
            html.table(["", *names], differing, told) if differing else "No argument, setting or version differs.",
        ),
        element("section", element("h2", "Curves"), html.figures(figures)) if figures else "",
    ]
    return html.document("Runs compared · vitkit", html.join((piece for piece in body if piece), "\n"))


def _cell(row: Row, place: int) -> html.Html:
    value, against = row.cell(place)
    kind = None if not np.isfinite(row.gains[place]) else "better" if row.gains[place] > 0 else "worse"
    shown_value = html.element("b", value) if row.best[place] else html.text(value)
    return html.join([shown_value, html.element("span", against, class_=kind)] if against else [shown_value], " ")
