"""`vitkit new plugin` and `vitkit new recipe`."""

from pathlib import Path
from typing import Annotated

import typer

from vitkit.cli.scaffold import new_plugin, new_recipe

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("plugin")
def plugin_command(
    name: Annotated[str, typer.Argument(help="the package's name, such as my-head; it registers my_head")],
    kind: Annotated[str, typer.Option(help="head, loss, backbone, dataset or evaluator")],
    out: Annotated[Path, typer.Option(help="where the package's directory is made")] = Path(),
) -> None:
    """Write a plugin: a package that installs, registers a working component and passes its own tests."""
    made = new_plugin(name, kind, out)
    typer.echo(f"{made} registers the {kind} {name.replace('-', '_')!r}. Next:")
    for line in (f"pip install -e {made}", f"vitkit check {name}", f"pytest {made}"):
        typer.echo(f"  {line}")


@app.command("recipe")
def recipe_command(
    name: Annotated[str, typer.Argument(help="the recipe's name, such as my_recipe")],
    out: Annotated[Path, typer.Option(help="the directory that it is written into")] = Path(),
) -> None:
    """Write a recipe that trains on digits at once."""
    made = new_recipe(name, out)
    typer.echo(f"{made} is a recipe. Next:\n  vitkit run {made}")
