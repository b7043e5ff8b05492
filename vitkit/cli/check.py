"""`vitkit check`: the conformance checks on the command line."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vitkit.cli.catalogue import registry_of
from vitkit.cli.console import cell, out
from vitkit.errors import printable

if TYPE_CHECKING:
    from vitkit.testing import Result

PROBLEM_CHARACTERS = 2000
"""Length at which the text of a failed check is cut."""


def check(
    name: Annotated[str, typer.Argument(help="a distribution, a registered name, or DISTRIBUTION:NAME")],
    arguments: Annotated[list[str] | None, typer.Option("--arg", help="an argument for the component, NAME=VALUE; may be repeated")] = None,
    kind: Annotated[str | None, typer.Option(help="check only this kind: backbone, head, loss, dataset or evaluator")] = None,
) -> None:
    """Check that components follow the contract of their kind; the exit code is 1 if one does not."""
    from vitkit.testing import examine, find
    from vitkit.training.recipe import parse_arguments

    cases = find(name, None if kind is None else registry_of(kind).kind, **parse_arguments(arguments or []))
    for case in cases if arguments else ():
        case.build()  # wrong arguments are the caller's mistake: one message, instead of one for each check
    results = []
    for case in cases:
        checked = examine(case)
        results += checked
        out.print(_table(f"{case} of {case.distribution}", checked))
    for note in (note for result in results for note in result.notes):
        out.print(f"note: {printable(note, PROBLEM_CHARACTERS)}")
    failed = [result for result in results if result.problem]
    for result in failed:
        out.print(f"\n{result.check}: {printable(result.problem, PROBLEM_CHARACTERS)}")
    out.print(f"\n{len(failed)} checks fail" if failed else "\nevery check passes", style="bold red" if failed else "bold green")
    raise typer.Exit(1 if failed else 0)


def _table(title: str, results: "list[Result]") -> Table:
    table = Table("check", "", "result", title=cell(title), title_justify="left")
    for result in results:
        verdict = cell("fails", "red") if result.problem else cell("passes", "green")
        table.add_row(result.check, verdict, cell(result.seen))
    return table


__all__ = ["check"]
