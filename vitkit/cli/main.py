"""The `vitkit` command: its subcommands and exit codes. A command that needs torch imports it when it is called."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vitkit import __version__
from vitkit.cli import attend, catalogue, check, data, doctor, hub, inference, new, reproduce
from vitkit.cli.console import err, flush_streams, out, prepare_streams, print_error
from vitkit.cli.plugin_commands import Commands
from vitkit.errors import UsageError, VitkitError, printable

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


def _version(asked: bool) -> None:
    if asked:
        out.print(f"vitkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")] = False,
) -> None:
    pass


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def run_command(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="FILE", help="the recipe, a .py file")] = None,
) -> None:
    """Run a recipe: `vitkit run FILE [flags]`; `vitkit run FILE --help` shows the recipe's own flags."""
    if recipe is None or str(recipe).startswith("-"):
        if recipe is None and not context.args:
            raise UsageError("no recipe is given; give its file, for example vitkit run recipes/jepa_mnist.py")
        out.print("Usage: vitkit run FILE [flags]\n\nRun a recipe. `vitkit run FILE --help` shows its flags.")
        raise typer.Exit(0 if "--help" in [str(recipe), *context.args] else 2)
    from vitkit.cli import run

    run.run(recipe, context.args)


app.command("list")(catalogue.list_components)
app.command("show")(catalogue.show_component)
app.command("doctor")(doctor.doctor)
app.command("check")(check.check)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="run directories")],
    page: Annotated[Path, typer.Option("--out", help="the page to write")] = Path("compare.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that vitkit compare did not write")] = False,
) -> None:
    """Compare runs: write one page with their different arguments, their results and their curves."""
    from vitkit.cli.compare import compare

    compare(runs, page, overwrite)


for _name, _command in inference.COMMANDS.items():
    app.command(_name)(_command)
app.command("attend")(attend.attend)
app.command("reproduce")(reproduce.reproduce)
app.command("push")(hub.push)
app.command("pull")(hub.pull)


def guarded(call: Callable[[], Any], *, debug: bool) -> int:
    """Call a command and return its exit code; an exception becomes a message, or passes through with `debug`."""
    try:
        call()
    except VitkitError as error:
        if debug:
            raise
        print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        err.print("interrupted")
        return 130
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:
        if debug:
            raise
        print_error(f"{type(error).__name__}: {printable(error, 2000)}")
        err.print("vitkit did not expect this error; the same command with --debug shows where it comes from")
        return 1
    return 0


def main() -> None:
    """The `vitkit` command. `--debug` may stand anywhere on the line."""
    prepare_streams()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    words = [number for number, argument in enumerate(arguments) if not argument.startswith("-")]
    # Words after a recipe's file belong to the recipe, which may have a flag --debug.
    end = words[1] if len(words) > 1 and arguments[words[0]] == "run" else len(arguments)
    arguments = [argument for argument in arguments[:end] if argument != "--debug"] + arguments[end:]
    code = guarded(lambda: app(arguments, prog_name="vitkit"), debug=debug)
    sys.exit(code if flush_streams() else code or 1)
