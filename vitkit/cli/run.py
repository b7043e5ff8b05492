"""`vitkit run`: a recipe's typed arguments and the runner's own settings as one command's flags."""

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vitkit.cli.console import err
from vitkit.errors import RunDirectoryError, UsageError, printable
from vitkit.runs.directory import newest_unfinished, read_summary
from vitkit.runs.settings import FREE, ONE_WAY, SETTINGS, requested
from vitkit.training.accelerator import resolve_device
from vitkit.training.launch import execute
from vitkit.training.recipe import Recipe, plain, typed

PANEL = "Every run"
CONTEXT = "_typer_context"
"""The parameter that typer fills with its context; a recipe may have a flag `context`."""


def run(path: Path, arguments: list[str]) -> None:
    """Read the recipe, parse its flags and run it; raises `typer.Exit` with the run's exit code."""
    recipe = Recipe(path, reserved=frozenset(SETTINGS))
    if "debug" not in recipe.flags:  # otherwise it is `vitkit --debug`, which may stand anywhere on the line
        arguments = [word for word in arguments if word != "--debug"]
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(cls=RecipeCommand, help=recipe.help)(_command(recipe))
    app(recipe.rewrite(arguments), prog_name=f"vitkit run {path}")


class RecipeCommand(TyperCommand):
    """A recipe's command. Its help shows a flag's names and its text one below the other where both don't fit on one line.

    typer's tables have a column for each of them. On a terminal of 80 columns they cut the names of long flags.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _command(recipe: Recipe) -> Any:
    """A function whose signature is the recipe's flags and the runner's settings, for typer to parse."""

    def command(**values: Any) -> None:
        given = {name for name in values if _is_given(values[CONTEXT], name)}
        settings = {name: values[name] for name in SETTINGS}
        flags = {name: values[name] if name in given or name not in recipe.preset_flags else None for name in recipe.flags}
        if settings["resume"] and not settings["overwrite"]:
            settings, flags = _recorded(recipe, settings, flags, given)
        line = _command_line(recipe, {**flags, **settings}, given)
        raise typer.Exit(execute(recipe, {**settings, "command": line}, flags, err))

    parameters = [inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, flag in recipe.flags.items():
        shows_default = flag.default_text is None and flag.default not in ([], None)
        text = flag.help if flag.default_text is None else f"{flag.help}  [default: {flag.default_text}]"
        option = typer.Option(help=text or None, rich_help_panel="The recipe", metavar=flag.metavar, show_default=shows_default)
        parameters.append(_parameter(name, Annotated[flag.annotation, option], flag.default))
    for name, setting in SETTINGS.items():
        names = (f"--{name.replace('_', '-')}",) if name in ONE_WAY else ()
        option = typer.Option(*names, help=setting.help, rich_help_panel=PANEL)
        parameters.append(_parameter(name, Annotated[setting.annotation, option], setting.default))
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _recorded(
    recipe: Recipe, settings: dict[str, Any], flags: dict[str, Any], given: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """On `--resume`, the settings and flags that the run was started with; a flag that would change its numbers raises."""
    directory = settings["out"] or newest_unfinished(recipe.name)
    summary = read_summary(directory)
    if not summary:
        return {**settings, "out": directory}, flags
    if _is_copy(recipe.path, directory):
        recipe.name = str(summary.get("recipe"))
    if summary.get("recipe") != recipe.name:
        raise RunDirectoryError(f"{directory} holds a run of {summary.get('recipe')!r}, not of {recipe.name!r}")
    resolved = {**recipe.rename(summary.get("arguments", {})), **summary.get("settings", {})}
    asked = recipe.rename(requested(summary))
    for name in (*flags, "seed", "precision", "grad_accum", *FREE):
        values = flags if name in flags else settings
        if name not in asked or (name in FREE and name in given):
            continue
        # The value that was chosen then counts as the same if the flag was not given, or was `auto` for a precision or preset.
        same = [asked[name]] + ([resolved.get(name)] if asked[name] is None or name in ("precision", "preset") else [])
        if name in given and plain(values[name]) not in same:
            raise RunDirectoryError(
                f"--{name.replace('_', '-')} was {asked[name]!r} when {directory} was started and is now "
                f"{plain(values[name])!r}; leave the flag out to resume, or start another run with another --out"
            )
        values[name] = typed(recipe.flags[name].annotation, asked[name]) if name in flags else asked[name]
    if "device" not in given:
        settings["device"] = _device(settings["device"], directory)
    given |= {name for name in asked if name in settings and settings[name] != SETTINGS[name].default}
    given |= {name for name in flags if asked.get(name) is not None and flags[name] != recipe.flags[name].default}
    return {**settings, "out": directory}, flags


def _is_copy(path: Path, directory: Path) -> bool:
    """True for the copy of the recipe that the run in `directory` keeps."""
    return path.name == "recipe.py" and path.resolve().parent == directory.resolve()


def _device(asked: str, directory: Path) -> str:
    """The device that a run was started with, or `auto` and a line if this machine does not have it."""
    try:
        resolve_device(asked)
    except UsageError as error:
        err.print(f"{printable(directory)} was started with {error}; resuming with --device auto")
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
