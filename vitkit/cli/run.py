"""`vitkit run`: a recipe's typed arguments and the runner's own settings as one command's flags."""

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.console import Console

from vitkit.errors import RunDirectoryError, UsageError
from vitkit.runs.directory import read_summary
from vitkit.runs.settings import FREE, ONE_WAY, SETTINGS, requested
from vitkit.training.recipe import Recipe, plain, typed

PANEL = "Every run"


def run(path: Path | None, arguments: list[str]) -> None:
    """Read the recipe, parse its flags and run it; leaves with the run's exit code."""
    if path is None or str(path).startswith("-"):
        if path is None and not arguments:
            raise UsageError("which recipe? vitkit run FILE, for example vitkit run recipes/jepa_mnist.py")
        typer.echo("Usage: vitkit run FILE [flags]\n\nRun a recipe. `vitkit run FILE --help` shows its flags.")
        raise typer.Exit(0 if "--help" in [str(path), *arguments] else 2)
    recipe = Recipe(path, reserved=frozenset(SETTINGS))
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command(help=recipe.help)(_command(recipe))
    app(arguments, prog_name=f"vitkit run {path}")


def _command(recipe: Recipe) -> Any:
    """A function whose signature is the recipe's flags and the runner's settings, for typer to parse."""

    def command(context: typer.Context, **values: Any) -> None:
        given = {name for name in values if _is_given(context, name)}
        settings = {name: values[name] for name in SETTINGS}
        flags = {name: values[name] for name in recipe.flags}
        console = Console(stderr=True, highlight=False)
        if settings["resume"] and not settings["overwrite"]:
            settings, flags = _recorded(recipe, settings, flags, given, console)
        from vitkit.training.launch import execute

        line = _command_line(recipe, {**flags, **settings}, given)
        raise typer.Exit(execute(recipe, {**settings, "command": line}, flags, console))

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    for name, flag in recipe.flags.items():
        hint, text = flag.annotation, None
        if get_origin(hint) is Annotated:
            hint, *extra = get_args(hint)
            text = next((item for item in extra if isinstance(item, str)), None)
        default = ... if flag.default is flag.empty else flag.default
        option = typer.Option(help=text, rich_help_panel="The recipe")
        parameters.append(_parameter(name, Annotated[hint, option], default))
    for name, setting in SETTINGS.items():
        names = (f"--{name.replace('_', '-')}",) if name in ONE_WAY else ()
        option = typer.Option(*names, help=setting.help, rich_help_panel=PANEL)
        parameters.append(_parameter(name, Annotated[setting.annotation, option], setting.default))
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    if default is ...:
        return inspect.Parameter(name, kind, annotation=annotation)
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _recorded(
    recipe: Recipe, settings: dict[str, Any], flags: dict[str, Any], given: set[str], console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """On `--resume`, the flags that the run was started with; one that is given and would change its numbers is refused."""
    from vitkit.runs.directory import newest_unfinished

    directory = settings["out"] or newest_unfinished(recipe.name)
    summary = read_summary(directory)
    if not summary:
        return {**settings, "out": directory}, flags
    if _is_copy(recipe.path, directory):
        recipe.name = str(summary.get("recipe"))
    if summary.get("recipe") != recipe.name:
        raise RunDirectoryError(f"{directory} holds a run of {summary.get('recipe')!r}, not of {recipe.name!r}")
    resolved: Mapping[str, Any] = {**summary.get("arguments", {}), **summary.get("settings", {})}
    asked: Mapping[str, Any] = requested(summary)
    for name in (*flags, "seed", "precision", "grad_accum", *FREE):
        values = flags if name in flags else settings
        if name not in asked or (name in FREE and name in given):
            continue
        # Where the recipe chose for want of a flag, and where `auto` was a precision, what was chosen is the same.
        same = [asked[name]] + ([resolved.get(name)] if asked[name] is None or name == "precision" else [])
        if name in given and plain(values[name]) not in same:
            raise RunDirectoryError(
                f"--{name.replace('_', '-')} was {asked[name]!r} when {directory} was started and is now "
                f"{plain(values[name])!r}; leave the flag out to go on, or start another run with another --out"
            )
        values[name] = typed(recipe.flags[name].annotation, asked[name]) if name in flags else asked[name]
    if "device" not in given:
        settings["device"] = _device(settings["device"], directory, console)
    given |= {name for name in asked if name in settings and settings[name] != SETTINGS[name].default}
    given |= {name for name in flags if name in asked and flags[name] != recipe.flags[name].default}
    return {**settings, "out": directory}, flags


def _is_copy(path: Path, directory: Path) -> bool:
    """Whether a recipe is the copy that the run in a directory keeps of its own."""
    return path.name == "recipe.py" and path.resolve().parent == directory.resolve()


def _device(asked: str, directory: Path, console: Console) -> str:
    """The device that a run was started with, or `auto` and a line where this machine has none such."""
    from vitkit.training.accelerator import resolve_device

    try:
        resolve_device(asked)
    except UsageError as error:
        console.print(f"{directory} was started with {error}; going on with --device auto", markup=False, soft_wrap=True)
        return "auto"
    return asked


def _command_line(recipe: Recipe, values: Mapping[str, Any], given: set[str]) -> str:
    """The command that starts this run again, without the directory."""
    words = ["vitkit", "run", str(recipe.path)]
    for name in values:
        if name not in given or name in ("out", "resume", "overwrite", "dry_run", "devices"):
            continue
        flag, value = f"--{name.replace('_', '-')}", plain(values[name])
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [flag, str(item)]
    return shlex.join(words)


__all__ = ["run"]
