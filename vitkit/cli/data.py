"""`vitkit data`: the dataset store on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vitkit.cli.console import cell, out
from vitkit.errors import printable

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_command() -> None:
    """List the datasets in the store, and the other registered ones."""
    from vitkit.data.store import read_store, store_directory, store_path, stored_names
    from vitkit.errors import DatasetError
    from vitkit.registry import datasets

    table = Table("name", "train", "test", "shape", "classes", "MB")
    broken = []
    names = stored_names()
    for name in names:
        path = store_path(name)
        try:
            stored = read_store(path)
        except DatasetError as error:
            broken.append(printable(error, 1000))
            continue
        shape = "×".join(map(str, stored.train.images.shape[1:]))
        counts = (f"{len(stored.train):,}", f"{len(stored.test):,}")
        table.add_row(cell(name), *counts, shape, str(len(stored.classes)), f"{path.stat().st_size / 1e6:.1f}")
    out.print(f"dataset store {printable(store_directory())}{'' if names else ': empty'}")
    if table.rows:
        out.print(table)
    for line in broken:
        out.print(f"broken: {line}", style="red")
    others = [name for name in datasets.names() if name not in names]
    out.print(f"also registered: {printable(', '.join(others), 10_000) or 'none'}")


@app.command("get")
def get_command(
    names: Annotated[list[str], typer.Argument(help="registered datasets, such as mnist cifar10")],
) -> None:
    """Download datasets into the store; a dataset that exists already is checked and kept."""
    from vitkit.registry import datasets

    for name in names:
        dataset = datasets.build(name)
        counts = " + ".join(f"{len(split):,}" for split in (dataset.train, dataset.val, dataset.test))
        out.print(f"{printable(name)}: {counts} images, {len(dataset.classes)} classes")


@app.command("import")
def import_command(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="a folder of images, with or without class folders")],
    name: Annotated[str, typer.Option(help="the dataset's name in the store")],
    img_size: Annotated[int, typer.Option(help="side of the stored images in pixels")] = 64,
    test_fraction: Annotated[float, typer.Option(help="share of each class that becomes the test split")] = 0.2,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="import all images without labels, in whatever folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a dataset that has this name")] = False,
) -> None:
    """Import a folder of your own images; recipes then take it as `--dataset NAME`.

    The folder holds a folder for each class, or train, val and test folders that do, or images without labels.
    """
    from vitkit.data.image_folder import import_folder
    from vitkit.data.store import read_store, store_path
    from vitkit.errors import UsageError
    from vitkit.registry import datasets

    if not folder.strip():
        raise UsageError("FOLDER is empty, perhaps an unset variable; give a folder of images, or . for the working directory")
    path = store_path(name)
    if name == "auto" or name in datasets:
        raise UsageError(f"--name {name}: that name has another meaning for --dataset; choose another name")
    if path.exists() and not overwrite:
        raise UsageError(f"--name {name}: {path} exists already; choose another name, or give --overwrite")
    for line in import_folder(Path(folder), name, img_size=img_size, test_fraction=test_fraction, unlabelled=unlabelled):
        out.print(f"left out: {printable(line, 1000)}")
    stored = read_store(path)
    for line in stored.metadata.get("layout", "").splitlines():
        out.print(printable(line, 1000))
    counts = " + ".join(f"{len(split):,}" for split in (stored.train, stored.val, stored.test) if split is not None)
    classes = f"in {len(stored.classes)} classes" if stored.classes else "without labels"
    out.print(f"{name}: {counts} images {classes} at {printable(path)}")
