"""`vitkit compare`: runs side by side, on the terminal and as a page."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkit.errors import UsageError

if TYPE_CHECKING:
    from vitkit.report.comparison import Comparison, Row

PIPE_WIDTH = 240
"""Columns where the output is no terminal: wide enough to keep a row on one line."""


def compare(runs: list[Path], out: Path) -> None:
    """Print what differs between runs and what came out; write the page `out` and beside it a PNG of curves.

    Raises `UsageError` for fewer than two runs, for one given twice, for a directory that holds none and for
    an `out` that is no `.html` file; `RunError` where the page cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UsageError(f"--out {out}: expected the name of a page, such as compare.html")
    from vitkit.report.compare import write_comparison  # matplotlib
    from vitkit.report.comparison import read_runs

    comparison = read_runs(runs)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(_table(comparison))
    for warning in comparison.warnings:
        console.print(Text(f"note: {warning}", style="yellow"), soft_wrap=True)
    sheet = write_comparison(comparison, out)
    console.print(Text(f"page: {out}" + (f", curves: {sheet}" if comparison.columns else "")), soft_wrap=True)


def _table(comparison: "Comparison") -> Table:
    table = Table(
        caption="bold: the best of a row; in brackets: the difference from the first run",
        caption_justify="left",
    )
    table.add_column()
    for name in comparison.names:
        table.add_column(Text(name), justify="right", overflow="fold")
    table.add_row("status", *(Text(str(record.summary.get("status", "unknown"))) for record in comparison.records))
    for group, rows in comparison.differences.items():
        table.add_section()
        table.add_row(Text(group, style="dim"))
        for name, values in rows.items():
            table.add_row(Text(name), *map(Text, values))
    table.add_section()
    table.add_row(Text("results", style="dim"))
    for row in comparison.results:
        table.add_row(Text(row.name), *(_cell(row, place) for place in range(len(comparison.names))))
    return table


def _cell(row: "Row", place: int) -> Text:
    value, against = row.cell(place)
    cell = Text(value, style="bold" if row.best[place] else "")
    if against:
        gain = row.gains[place]
        cell.append(f" {against}", "not bold " + ("dim" if math.isnan(gain) else "green" if gain > 0 else "red"))
    return cell


__all__ = ["compare"]
