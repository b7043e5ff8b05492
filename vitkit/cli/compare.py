"""`vitkit compare`: runs side by side, on the terminal and as a page."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkit.errors import UsageError, printable

if TYPE_CHECKING:
    from vitkit.report.comparison import Comparison, Row

PIPE_COLUMNS = 240
"""Width where the output is not a terminal: enough to keep a row on one line."""


def compare(runs: list[Path], out: Path, overwrite: bool = False) -> None:
    """Write the page `out` and beside it a PNG of curves, then print the differences between runs and their results.

    Raises `UsageError` for fewer than two runs, for one given twice, for a directory that holds none, for an `out` that
    is not a `.html` file, and for one that `vitkit compare` did not write without `overwrite`; `RunError` if the page
    cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UsageError(f"--out {out}: expected the name of a page, such as compare.html")
    from vitkit.report.compare_page import write_comparison  # matplotlib
    from vitkit.report.comparison import read_runs

    comparison = read_runs(runs)
    sheet = write_comparison(comparison, out, overwrite=overwrite)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_COLUMNS)
    console.print(_table(comparison))
    for warning in comparison.warnings:
        console.print(Text(f"note: {printable(warning)}", style="yellow"), soft_wrap=True)
    console.print(Text(f"page: {out}" + (f", curves: {sheet}" if comparison.columns else "")), soft_wrap=True)


def _table(comparison: "Comparison") -> Table:
    table = Table(
        caption="bold: the best of a row; in brackets: the difference from the first run",
        caption_justify="left",
    )
    table.add_column()
    for name in comparison.names:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    table.add_row("status", *(Text(printable(record.status)) for record in comparison.records))
    for group, rows in comparison.differences.items():
        table.add_section()
        table.add_row(Text(group, style="dim"))
        for name, values in rows.items():
            table.add_row(Text(printable(name)), *(Text(printable(value)) for value in values))
    table.add_section()
    table.add_row(Text("results", style="dim"))
    for row in comparison.results:
        table.add_row(Text(printable(row.name)), *(_cell(row, place) for place in range(len(comparison.names))))
    return table


def _cell(row: "Row", place: int) -> Text:
    value, difference = row.cell(place)
    cell = Text(value, style="bold" if row.best[place] else "")
    if difference:
        color = {"better": "green", "worse": "red"}.get(row.verdict(place), "dim")
        cell.append(f" {difference}", f"not bold {color}")
    return cell


__all__ = ["compare"]
