"""The report of one run: `plots/*.png` and `report.html`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.files import atomic_write, write_text
from vitkit.report import curves
from vitkit.report.page import page
from vitkit.report.record import read_record
from vitkit.report.style import Plot, house_style, png
from vitkit.report.templating import PlotImage

if TYPE_CHECKING:
    from vitkit.contracts import ReportFigure


def write_report(
    directory: str | Path,
    figures: Mapping[str, "ReportFigure"] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write `plots/*.png` and `report.html` of the run in `directory`, and return the path of the page.

    `summary` takes the place of the directory's `summary.json`, before that is written. The page leaves out parts
    without data, and names a figure that cannot be drawn, with the reason.
    Raises `UsageError` for a table that cannot be read and `RunError` if a file cannot be written.
    """
    directory = Path(directory)
    record = read_record(directory)
    record = record if summary is None else replace(record, summary=summary)
    training: list[PlotImage] = []
    evaluation: list[PlotImage] = []
    problems: list[str] = []

    def add(images: list[PlotImage], name: str, draw: Callable[[], Plot | None]) -> None:
        try:
            plot = draw()
            data = png(plot.figure) if plot else b""
        except Exception as error:  # an error in one figure must not lose the report of a long run
            problems.append(f"{name}: {error}")
            return
        if plot:
            with atomic_write(directory / "plots" / f"{_file_name(name)}.png") as temporary:
                temporary.write_bytes(data)
            images.append(PlotImage(plot, data))

    with house_style():
        add(training, "losses", partial(curves.losses, record))
        add(training, "pace", partial(curves.pace, record))
        add(evaluation, "metrics", partial(curves.metrics, record))
        add(evaluation, "accuracies", partial(curves.bars, record))
        for name, figure in (figures or {}).items():
            add(evaluation, name, partial(_draw, name, figure))
    write_text(directory / "report.html", page(record, training, evaluation, problems))
    return directory / "report.html"


def _draw(name: str, figure: "ReportFigure") -> Plot:
    from vitkit.report.figures import draw_figure  # scikit-learn and torch

    return draw_figure(name, figure)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)[:80].strip("_") or "figure"
