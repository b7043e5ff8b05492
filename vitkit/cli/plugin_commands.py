"""Subcommands that plugins add to the command line: `[project.entry-points."vitkit.commands"]`.

`sample = "vitkit_vae.commands:sample"` names a function whose typed arguments are the command's arguments and flags, as
typer reads them, and whose docstring is its help. `vitkit --help` lists it without importing its plugin.
"""

from functools import cached_property
from typing import Any

import typer
from typer.core import TyperGroup

from vitkit.errors import PluginError, UnknownNameError, nearest
from vitkit.registry import Entry, Registry

commands = Registry("command")


class Commands(TyperGroup):
    """vitkit's own commands and those of installed plugins; an own command always wins over a plugin's."""

    @cached_property
    def _added(self) -> dict[str, Entry]:
        """What plugins add, by name: one look through all installed distributions for one command line."""
        return {entry.name: entry for entry in reversed(commands.entries())}  # of two of a name the first is shown

    def own_commands(self, ctx: Any) -> list[str]:
        """vitkit's own alone."""
        return super().list_commands(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys([*super().list_commands(ctx), *sorted(self._added)]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """An own command, or for listing alone a stand-in with a plugin's first line of help."""
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in self._added:
            return own
        return _stand_in(self._added[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        own = super().list_commands(ctx)
        if name.startswith("-") or name in own:
            return super().resolve_command(ctx, args)
        known = self.list_commands(ctx)
        if name.rpartition(":")[2] not in known:
            raise UnknownNameError(f"no command named {name!r}{nearest(name, known) or ';'} known: {', '.join(known)}")
        return name, command_of(commands.entry(name)), args[1:]


def command_of(entry: Entry) -> Any:
    """The command that an entry names; `PluginError` where its function cannot be imported or is no command to typer."""
    function = entry.load()
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    try:
        app.command(entry.name)(function)
        return typer.main.get_command(app)
    except Exception as error:  # typer answers an argument that it cannot read in several ways
        raise PluginError(
            f"command {entry.name!r} of {entry.distribution} {entry.version} ({entry.value}) cannot be read: "
            f"{type(error).__name__}: {error}; its author must mend it"
        ) from error


def _stand_in(entry: Entry) -> Any:
    app = typer.Typer(add_completion=False)

    @app.command(entry.name, help=entry.summary or f"of {entry.distribution} {entry.version}")
    def stand_in() -> None: ...

    return typer.main.get_command(app)


__all__ = ["Commands", "command_of", "commands"]
