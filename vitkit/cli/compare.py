"""`vitkit compare`: runs side by side, on the terminal and as a page."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from vitkit.cli.console import cell
from vitkit.cli.console import out as console
from vitkit.errors import UsageError, printable

if TYPE_CHECKING:
    from vitkit.report.comparison import Comparison, Row


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
    console.print(_table(comparison))
    for warning in comparison.warnings:
        console.print(f"note: {printable(warning)}", style="yellow")
    console.print(f"page: {printable(out)}" + (f", curves: {printable(sheet)}" if comparison.columns else ""))


def _table(comparison: "Comparison") -> Table:
    table = Table(
        caption="bold: the best of a row; in brackets: the difference from the first run",
        caption_justify="left",
    )
    table.add_column()
    for name in comparison.names:
        table.add_column(cell(name), justify="right", overflow="fold")
    table.add_row("status", *(cell(record.status) for record in comparison.records))
    for group, rows in comparison.differences.items():
        table.add_section()
        table.add_row(cell(group, "dim"))
        for name, values in rows.items():
            table.add_row(cell(name), *(cell(value) for value in values))
    table.add_section()
    table.add_row(cell("results", "dim"))
    for row in comparison.results:
        table.add_row(cell(row.name), *(_cell(row, place) for place in range(len(comparison.names))))
    return table


def _cell(row: "Row", place: int) -> Text:
    value, difference = row.cell(place)
    text = Text(value, style="bold" if row.best[place] else "")
    if difference:
        color = {"better": "green", "worse": "red"}.get(row.verdict(place), "dim")
        text.append(f" {difference}", f"not bold {color}")
    return text


__all__ = ["compare"]
