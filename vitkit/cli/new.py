"""`vitkit new plugin` and `vitkit new recipe`."""

from pathlib import Path
from typing import Annotated

import typer

from vitkit.cli.console import out as console
from vitkit.cli.scaffold import new_plugin, new_recipe
from vitkit.errors import printable, shell_command

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("plugin")
def plugin_command(
    name: Annotated[str, typer.Argument(help="the package's name, such as my-head; it registers my_head")],
    kind: Annotated[str, typer.Option(help="kind of the component: head, loss, backbone, dataset or evaluator")],
    out: Annotated[Path, typer.Option(help="the folder in which the package's directory is created")] = Path(),
) -> None:
    """Write a plugin: a package that installs, registers a working component and passes its own tests."""
    folder = new_plugin(name, kind, out)
    console.print(f"{printable(folder)} registers the {kind} {name.replace('-', '_')!r}. Next:")
    for words in (("pip", "install", "-e", folder), ("vitkit", "check", name), ("pytest", folder)):
        console.print(f"  {shell_command(*words)}")


@app.command("recipe")
def recipe_command(
    name: Annotated[str, typer.Argument(help="the recipe's name, such as my_recipe")],
    out: Annotated[Path, typer.Option(help="the folder in which the recipe is written")] = Path(),
) -> None:
    """Write a recipe that trains on digits at once."""
    path = new_recipe(name, out)
    console.print(f"{printable(path)} is a recipe. Next:\n  {shell_command('vitkit', 'run', path)}")
