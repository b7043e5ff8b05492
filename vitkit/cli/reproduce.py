"""`vitkit reproduce`: run a finished run again, and compare its numbers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vitkit.cli.console import cell, err, out
from vitkit.errors import UsageError, printable

if TYPE_CHECKING:
    from vitkit.reproduce import Code, Reproduction


def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a finished run: its directory, or hf://OWNER/NAME on the Hub")],
    directory: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="the new run's directory  [default: runs/RECIPE/TIME]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume the interrupted reproduction in --out")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="run the code of a local run without asking")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code of a Hub repository without asking")
    ] = False,
) -> None:
    """Run a run's recipe again with its arguments and seed, and give a verdict for each metric.

    This executes Python code: the run's copy of its recipe. You are asked first. The exit code is 1 if a metric differs by
    more than its tolerance.
    """
    from vitkit.reproduce import reproduce as run_again

    def confirm(code: "Code") -> bool:
        err.print(code.warning)
        if trust_remote_code if code.foreign else yes:
            return True
        if not sys.stdin.isatty():
            if code.foreign:
                raise UsageError(
                    "this code comes from the Hub, and there is no terminal to confirm that it may run: read it, then give "
                    "--trust-remote-code (--yes does not cover it)"
                )
            raise UsageError("there is no terminal to confirm that this code may run; give --yes if you trust it")
        return typer.confirm("Run it?", err=True)

    reproduction = run_again(run, out=directory, resume=resume, confirm=confirm, console=err)
    if reproduction is None:
        raise typer.Exit(130)
    _print(reproduction, run)
    raise typer.Exit(0 if reproduction.agrees else 1)


def _print(reproduction: "Reproduction", run: str) -> None:
    table = Table(
        "metric", "recorded", "now", "difference", "allowed", "verdict",
        title=cell(f"reproduction of {run}"), title_justify="left",
    )  # fmt: skip
    for verdict in reproduction.verdicts:
        values = ["none" if value is None else f"{value:.6g}" for value in (verdict.recorded, verdict.reproduced)]
        difference, allowed = "", verdict.rule
        if verdict.recorded is not None and verdict.reproduced is not None:
            difference = f"{verdict.reproduced - verdict.recorded:+.2g}"
            allowed = f"{verdict.tolerance:.2g} ({verdict.rule})"
        word = cell("agrees", "green") if verdict.agrees else cell("differs", "bold red")
        table.add_row(cell(verdict.metric), *values, difference, allowed, word)
    out.print(table)
    for line in reproduction.differences:
        out.print(cell(f"not as recorded: {line}", "yellow"))
    result = "every metric agrees" if reproduction.agrees else "not every metric agrees"
    out.print(f"{result}; the new run: {printable(reproduction.directory)}")


__all__ = ["reproduce"]
