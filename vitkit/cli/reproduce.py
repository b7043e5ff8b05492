"""`vitkit reproduce`: a run once more, and whether it gives the same numbers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkit.errors import UsageError

if TYPE_CHECKING:
    from vitkit.reproduce import Reproduction


def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a finished run: its directory, or OWNER/NAME on the Hub")],
    out: Annotated[Path | None, typer.Option(help="the new run's directory; default runs/RECIPE/TIME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the one in --out that was stopped")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="run the recipe's code without asking")] = False,
) -> None:
    """Run a run's recipe again with its arguments and seed, and give a verdict for each metric.

    The exit code is 1 where one differs by more than its tolerance. It runs the run's copy of its recipe, and asks before.
    """
    from vitkit.reproduce import reproduce as again

    err = Console(stderr=True, highlight=False)

    def confirm(text: str) -> bool:
        err.print(text, markup=False, soft_wrap=True)
        if yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to be asked whether that code may run; give --yes if you trust it")
        return typer.confirm("Run it?", err=True)

    done = again(run, out=out, resume=resume, confirm=confirm, console=err)
    if done is None:
        raise typer.Exit(130)
    _show(done, run)
    raise typer.Exit(0 if done.agrees else 1)


def _show(done: "Reproduction", run: str) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    table = Table("metric", "recorded", "now", "difference", "allowed", "verdict", title=Text(f"{run} again"), title_justify="left")
    for one in done.verdicts:
        both = one.recorded is not None and one.found is not None
        shown = ["none" if value is None else f"{value:.6g}" for value in (one.recorded, one.found)]
        difference = f"{one.found - one.recorded:+.2g}" if one.recorded is not None and one.found is not None else ""
        verdict = Text("agrees", "green") if one.agrees else Text("differs", "bold red")
        table.add_row(Text(one.metric), *shown, difference, f"{one.tolerance:.2g} ({one.rule})" if both else one.rule, verdict)
    console.print(table)
    for line in done.differences:
        console.print(Text(f"not as it was: {line}", style="yellow"), soft_wrap=True)
    whole = "every metric agrees" if done.agrees else "not every metric agrees"
    console.print(Text(f"{whole}; the new run: {done.directory}"), soft_wrap=True)


__all__ = ["reproduce"]
