"""`vitkit check`: the conformance kit from the shell."""

from rich.console import Console
from rich.table import Table

from vitkit.testing import Result, examine, find
from vitkit.training.recipe import parse_arguments


def check(name: str, arguments: list[str], kind: str | None, console: Console) -> bool:
    """Run every check of a distribution or a name, print a table and the problems; whether all passed."""
    cases = find(name, kind, **parse_arguments(arguments))
    for case in cases if arguments else ():
        case.build()  # arguments that do not fit are the caller's mistake: one message, not one for every check
    failed: list[Result] = []
    for case in cases:
        table = Table("check", "", "seen", title=f"{case} of {case.distribution}", title_justify="left")
        for result in examine(case):
            table.add_row(result.check, "[red]fails[/]" if result.problem else "[green]passes[/]", result.seen)
            failed += [result] if result.problem else []
        console.print(table)
    for result in failed:
        console.print(f"\n{result.check}: {result.problem}", markup=False)
    said = f"[bold red]{len(failed)} checks fail[/]" if failed else "[bold green]every check passes[/]"
    console.print(f"\n{said}")
    return not failed


__all__ = ["check"]
