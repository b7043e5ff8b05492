"""What a run left behind, as pictures and one self-contained page."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.files import atomic_write, write_text
from vitkit.report import curves, html
from vitkit.report.page import page
from vitkit.report.record import Record, read_record
from vitkit.report.sheet import write_sheet
from vitkit.report.style import Plot, house_style, png

if TYPE_CHECKING:
    from vitkit.contracts import ReportFigure


def write_report(
    directory: str | Path,
    figures: Mapping[str, "ReportFigure"] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write `plots/*.png` and `report.html` of the run in `directory`; the page's path.

    `summary` is shown in place of what the directory's `summary.json` says, before that is written.
    What is missing leaves its part of the page out; a picture that cannot be drawn is named on the page.
    Raises `UsageError` for a table that cannot be read and `RunError` where nothing can be written.
    """
    directory = Path(directory)
    record = read_record(directory)
    record = record if summary is None else replace(record, summary=summary)
    training: list[html.Html] = []
    evaluation: list[html.Html] = []
    problems: list[str] = []
    with house_style():
        for plot in _curves(record):
            (evaluation if plot.name in ("metrics", "accuracies") else training).append(
                _keep(directory, plot.name, plot)
            )
        for name, figure in (figures or {}).items():
            from vitkit.report.figures import draw_figure  # scikit-learn, torch

            try:
                plot = draw_figure(name, figure)
                evaluation.append(_keep(directory, _file_name(name), plot))
            except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
                # A plugin's mistake costs its picture, never the report of a long run.
                problems.append(f"{name}: {error}")
    write_text(directory / "report.html", page(record, training, evaluation, problems))
    return directory / "report.html"


def _curves(record: Record) -> list[Plot]:
    statistics = (curves.statistic(record, name) for name in (*record.losses, *record.metrics))
    found = (
        curves.losses(record),
        *statistics,
        curves.pace(record),
        curves.metrics(record),
        curves.bars(record),
    )
    return [plot for plot in found if plot is not None]


def _keep(directory: Path, name: str, plot: Plot) -> html.Html:
    """Write the plot's PNG and return its figure for the page."""
    data = png(plot.figure)
    with atomic_write(directory / "plots" / f"{_file_name(name)}.png") as temporary:
        temporary.write_bytes(data)
    return html.picture(plot, data)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)[:80].strip("_") or "picture"


__all__ = ["write_report", "write_sheet"]
