"""The command line. What needs torch is imported inside the command that needs it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vitkit import __version__
from vitkit.cli import data, hub, inference, new, reproduce
from vitkit.cli.plugin_commands import Commands
from vitkit.errors import UsageError, VitkitError, nearest
from vitkit.registry import KINDS, REGISTRIES, Registry, signature_of

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Learn representations with vision transformers: recipes composed from plugins.",
)
app.add_typer(data.app, name="data", help="The dataset store: list, download and import datasets.")
app.add_typer(new.app, name="new", help="Write a plugin or a recipe to start from.")
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"vitkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def run_command(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="FILE", help="The recipe, a .py file.")] = None,
) -> None:
    """Run a recipe: `vitkit run FILE [flags]`; `vitkit run FILE --help` shows the recipe's own flags."""
    from vitkit.cli import run

    run.run(recipe, context.args)


@app.command("list")
def list_command(
    kind: Annotated[str | None, typer.Argument(help="backbones, heads, losses, datasets or evaluators")] = None,
) -> None:
    """List what is registered: name, distribution, version and one line, without importing any plugin."""
    chosen = [_registry(kind)] if kind else list(REGISTRIES.values())
    for registry in chosen:
        entries = registry.entries()
        table = Table("name", "distribution", "version", "", title=registry.group.split(".")[1], title_justify="left")
        names = [entry.name for entry in entries]
        for entry in entries:
            name = entry.name if names.count(entry.name) == 1 else f"{entry.distribution}:{entry.name}"
            table.add_row(name, entry.distribution, entry.version, entry.summary)
        out.print(table if entries else f"{table.title}: none is installed")


@app.command("show")
def show_command(
    kind: Annotated[str, typer.Argument(help="backbone, head, loss, dataset or evaluator")],
    name: Annotated[str, typer.Argument(help="a registered name, or DISTRIBUTION:NAME")],
) -> None:
    """Show one registered name: its signature with types and defaults, its docstring and its source file."""
    import inspect

    registry = _registry(kind)
    entry = registry.entry(name)
    factory = entry.load()
    try:
        source = inspect.getsourcefile(inspect.unwrap(getattr(factory, "func", factory))) or "unknown"
    except TypeError:
        source = "unknown"
    out.print(f"[bold]{registry.kind} {entry.name}[/] of {entry.distribution} {entry.version}")
    out.print(_folded(signature_of(entry.name, factory)), markup=False)
    out.print(f"\n{inspect.getdoc(factory) or 'no docstring'}\n", markup=False)
    out.print(f"source: {source}", markup=False)


@app.command("doctor")
def doctor_command(context: typer.Context) -> None:
    """Say what is installed, what is broken and why; exit code 1 when something is broken."""
    from vitkit.cli.doctor import examine

    root = context.find_root()
    assert isinstance(root.command, Commands)
    raise typer.Exit(1 if examine(out, root.command.own_commands(root)) else 0)


@app.command("check")
def check_command(
    name: Annotated[str, typer.Argument(help="a distribution, a registered name, or DISTRIBUTION:NAME")],
    arguments: Annotated[list[str] | None, typer.Option("--arg", help="an argument of the component, NAME=VALUE")] = None,
    kind: Annotated[str | None, typer.Option(help="of this kind alone: backbone, head, loss, dataset or evaluator")] = None,
) -> None:
    """Check that components do what the contract of their kind asks; exit code 1 when one does not."""
    from vitkit.cli.check import check

    kind = None if kind is None else _registry(kind).kind
    raise typer.Exit(0 if check(name, arguments or [], kind, out) else 1)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="run directories")],
    page: Annotated[Path, typer.Option("--out", help="the page to write")] = Path("compare.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that vitkit compare did not write")] = False,
) -> None:
    """Put runs side by side: what differs in arguments and results, and their curves in one picture."""
    from vitkit.cli.compare import compare

    compare(runs, page, overwrite)


_OTHERS: dict[str, Callable[..., None]] = {
    **inference.COMMANDS,
    "reproduce": reproduce.reproduce,
    "push": hub.push,
    "pull": hub.pull,
}
for _name, _command in _OTHERS.items():
    app.command(_name)(_command)


def _registry(kind: str) -> Registry:
    """The registry of a kind, named in the singular or the plural."""
    for registry in REGISTRIES.values():
        if kind in (registry.kind, registry.group.split(".")[1]):
            return registry
    near = nearest(kind, KINDS) or ";"
    raise UsageError(f"no kind named {kind!r}{near} kinds: {', '.join(KINDS)}")


def _folded(signature: str) -> str:
    """A long signature with one argument a line."""
    name, _, rest = signature.partition("(")
    if len(signature) <= 100:
        return signature
    depth, pieces, current = 0, [], ""
    for character in rest[:-1]:
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += character
    return f"{name}(\n" + "".join(f"    {piece},\n" for piece in [*pieces, current.strip()] if piece) + ")"


def guarded(call: Callable[[], Any], *, debug: bool) -> int:
    """Call, and turn a `VitkitError` into its message and exit code."""
    try:
        call()
    except VitkitError as error:
        if debug:
            raise
        err.print(f"[bold red]error:[/] {_escaped(str(error))}")
        return error.exit_code
    except KeyboardInterrupt:
        err.print("interrupted")
        return 130
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        if debug:
            raise
        err.print(f"[bold red]error:[/] {type(error).__name__}: {_escaped(str(error))}")
        err.print("this is not one of vitkit's own messages; the same command with --debug shows where it comes from")
        return 1
    return 0


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def main() -> None:
    """The `vitkit` command. `--debug` is taken anywhere on the line."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments = [argument for argument in arguments if argument != "--debug"]
    sys.exit(guarded(lambda: app(arguments, prog_name="vitkit"), debug=debug))
