"""`vitkit list` and `vitkit show`: the registered components."""

from typing import Annotated

import typer
from rich.table import Table

from vitkit.cli.console import cell, out
from vitkit.component_arguments import signature_of
from vitkit.errors import LINE_CHARACTERS, UsageError, nearest, printable
from vitkit.registry import KINDS, REGISTRIES, Registry

SIGNATURE_CHARACTERS = 100
"""A longer signature is printed with one argument a line."""


def list_components(
    kind: Annotated[str | None, typer.Argument(help="backbones, heads, losses, datasets or evaluators")] = None,
) -> None:
    """List registered components with their distribution, version and summary; no plugin is imported."""
    chosen = [registry_of(kind)] if kind else list(REGISTRIES.values())
    for registry in chosen:
        entries = registry.entries()
        table = Table("name", "distribution", "version", "", title=registry.group.split(".")[1], title_justify="left")
        names = [entry.name for entry in entries]
        for entry in entries:
            name = entry.name if names.count(entry.name) == 1 else f"{entry.distribution}:{entry.name}"
            table.add_row(*map(cell, (name, entry.distribution, entry.version, entry.summary)))
        out.print(table if entries else f"{table.title}: none is installed")


def show_component(
    kind: Annotated[str, typer.Argument(help="backbone, head, loss, dataset or evaluator")],
    name: Annotated[str, typer.Argument(help="a registered name, or DISTRIBUTION:NAME")],
) -> None:
    """Show one component: its signature with types and defaults, its docstring and its source file."""
    import inspect

    registry = registry_of(kind)
    entry = registry.entry(name)
    factory = entry.load()
    try:
        source = inspect.getsourcefile(inspect.unwrap(getattr(factory, "func", factory))) or "unknown"
    except TypeError:
        source = "unknown"
    out.print(f"{registry.kind} {printable(entry.name)} of {printable(entry.distribution)} {printable(entry.version)}", style="bold")
    _print_lines(_folded(signature_of(entry.name, factory)))
    out.print()
    _print_lines(inspect.getdoc(factory) or "no docstring")
    out.print(f"\nsource: {printable(source)}")


def registry_of(kind: str) -> Registry:
    """The registry of a kind, named in the singular or the plural; `UsageError` for any other name."""
    for registry in REGISTRIES.values():
        if kind in (registry.kind, registry.group.split(".")[1]):
            return registry
    near = nearest(kind, KINDS) or ";"
    raise UsageError(f"no kind named {kind!r}{near} expected {', '.join(KINDS)}")


def _print_lines(text: str) -> None:
    for line in text.split("\n"):
        out.print(printable(line, LINE_CHARACTERS))


def _folded(signature: str) -> str:
    """A long signature with one argument a line."""
    name, _, rest = signature.partition("(")
    if len(signature) <= SIGNATURE_CHARACTERS:
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


__all__ = ["list_components", "registry_of", "show_component"]
