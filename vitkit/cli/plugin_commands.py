"""Subcommands that plugins add to the command line: `[project.entry-points."vitkit.commands"]`.

`sample = "vitkit_vae.commands:sample"` names a function. Its typed arguments are the command's arguments and flags, as typer
reads them; its docstring is the help. `vitkit --help` lists the command without importing the plugin.
"""

from functools import cached_property
from typing import Any

import typer
from typer.core import TyperGroup

from vitkit.errors import PluginError, UnknownNameError, nearest, printable
from vitkit.registry import Entry, Registry

commands = Registry("command")


class Commands(TyperGroup):
    """The built-in commands and the commands of plugins; of two with the same name the built-in one is called."""

    @cached_property
    def _plugin_entries(self) -> dict[str, Entry]:
        """The commands of plugins by name; installed distributions are searched once."""
        return {entry.name: entry for entry in reversed(commands.entries())}  # the first of equal names is listed

    def built_in(self, ctx: Any) -> list[str]:
        """The names of vitkit's own commands."""
        return super().list_commands(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys([*super().list_commands(ctx), *sorted(self._plugin_entries)]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A built-in command, or for a plugin's command a stand-in with its name and summary, for listing."""
        command = super().get_command(ctx, cmd_name)
        if command is not None or cmd_name not in self._plugin_entries:
            return command
        return _stand_in(self._plugin_entries[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name.startswith("-") or name in super().list_commands(ctx):
            return super().resolve_command(ctx, args)
        names = self.list_commands(ctx)
        if name.rpartition(":")[2] not in names:
            raise UnknownNameError(f"no command named {name!r}{nearest(name, names) or ';'} known: {', '.join(names)}")
        return name, command_of(commands.entry(name)), args[1:]


def command_of(entry: Entry) -> Any:
    """The command of an entry; `PluginError` if its function cannot be imported or is not a command for typer."""
    function = entry.load()
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    try:
        app.command(entry.name)(function)
        return typer.main.get_command(app)
    except Exception as error:  # typer raises several types for an argument that it cannot read
        raise PluginError(
            f"command {entry.name!r} of {printable(entry.distribution)} {printable(entry.version)} ({printable(entry.value)}) cannot be "
            f"read: {type(error).__name__}: {printable(error)}; report it to the plugin's author"
        ) from error


def _stand_in(entry: Entry) -> Any:
    app = typer.Typer(add_completion=False)

    @app.command(entry.name, help=printable(entry.summary or f"of {entry.distribution} {entry.version}"))
    def stand_in() -> None: ...

    return typer.main.get_command(app)


__all__ = ["Commands", "command_of", "commands"]
