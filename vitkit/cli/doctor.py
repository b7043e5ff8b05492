"""`vitkit doctor`: installed plugins, versions, devices and datasets, with the broken ones and known vulnerabilities."""

import platform
import sys
import time
from collections.abc import Collection
from importlib.metadata import distributions

import typer
from rich.table import Table

from vitkit import __version__
from vitkit.cli.console import cell, out
from vitkit.cli.plugin_commands import Commands, command_of, commands
from vitkit.cli.vulnerabilities import known_vulnerabilities
from vitkit.errors import DatasetError, PluginError, printable
from vitkit.registry import REGISTRIES, version_of

LIBRARIES = ("torch", "torchvision", "accelerate", "safetensors", "huggingface_hub", "einops", "numpy", "pillow", "scikit-learn")
SLOW_IMPORT_SECONDS = 5.0


def doctor(context: typer.Context) -> None:
    """Show plugins, versions, devices and datasets, and list the broken ones; the exit code is 1 if anything is broken."""
    root = context.find_root()
    assert isinstance(root.command, Commands)
    broken = _plugins(root.command.built_in(root)) + _unreadable_metadata()
    out.print(_versions())
    broken += _devices() + _store()
    for line in known_vulnerabilities(version_of):
        out.print(f"warning: {line}", style="yellow")
    if broken:
        out.print(f"\n{len(broken)} broken:", style="bold red")
        for line in broken:
            out.print(f"- {printable(line, 1000)}")
    else:
        out.print("\nnothing is broken", style="bold green")
    raise typer.Exit(1 if broken else 0)


def _plugins(built_in: Collection[str]) -> list[str]:
    """Print each distribution with its counts of registered names, and return a line for each that is broken."""
    broken: list[str] = []
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    notes: list[str] = []
    for registry in [*REGISTRIES.values(), commands]:
        entries = registry.entries()
        names = [entry.name for entry in entries]
        for entry in entries:
            began, fault = time.perf_counter(), 0
            try:
                command_of(entry) if registry is commands else entry.load()
            except PluginError as error:
                broken.append(str(error))
                fault = 1
            seconds = time.perf_counter() - began
            if seconds > SLOW_IMPORT_SECONDS:
                notes.append(f"{entry.distribution} took {seconds:.0f} s to import")
            if names.count(entry.name) > 1:
                notes.append(
                    f"{registry.kind} {entry.name!r} is registered by several distributions; "
                    f"{entry.distribution}:{entry.name} names this one"
                )
            if registry is commands and entry.name in built_in:
                notes.append(
                    f"command {entry.name!r} of {entry.distribution} is hidden by vitkit's own; "
                    f"{entry.distribution}:{entry.name} runs it"
                )
            good, bad = counts.get((entry.distribution, entry.version), (0, 0))
            counts[(entry.distribution, entry.version)] = (good + 1 - fault, bad + fault)
    table = Table("distribution", "version", "registers", "broken", title="plugins", title_justify="left")
    for (name, version), (good, bad) in sorted(counts.items()):
        table.add_row(cell(name), cell(version), str(good), cell(bad, "red" if bad else ""))
    out.print(table)
    for line in notes:
        out.print(f"note: {printable(line)}")
    return broken


def _unreadable_metadata() -> list[str]:
    broken = []
    for distribution in distributions():
        try:
            _ = distribution.entry_points
        except Exception as error:  # a damaged file makes the parser raise any type
            name = getattr(distribution, "_path", "a distribution")
            broken.append(f"{name}: entry points cannot be read ({type(error).__name__}: {error}); reinstall it")
    return broken


def _versions() -> Table:
    table = Table(title="versions", title_justify="left", show_header=False)
    table.add_row("vitkit", __version__)
    table.add_row("python", f"{platform.python_version()} ({printable(sys.executable)})")
    for name in LIBRARIES:
        version = version_of(name)
        table.add_row(name, cell(version) if version else cell("not installed", "red"))
    return table


def _devices() -> list[str]:
    try:
        import torch

        from vitkit.runs.summary import processor
        from vitkit.training.accelerator import resolve_device
        from vitkit.training.compile import has_compiler
        from vitkit.training.processor import cpu_unit, has_fast_bf16
    except Exception as error:
        return [f"torch cannot be imported: {type(error).__name__}: {error}; pip install --force-reinstall torch"]
    table = Table(title="devices", title_justify="left", show_header=False)
    bf16 = {True: "bf16 in hardware: --precision auto is bf16", False: "no bf16 unit: --precision auto is fp32"}
    unit = cpu_unit()
    unit = "no vector unit for matrix products" if unit == "none" else f"{unit} for matrix products"
    table.add_row("cpu", f"{processor()}, {torch.get_num_threads()} threads, {unit}, {bf16[has_fast_bf16('cpu')]}")
    for index in range(torch.cuda.device_count()):
        table.add_row(f"cuda:{index}", f"{printable(torch.cuda.get_device_name(index))}, {bf16[has_fast_bf16('cuda')]}")
    if torch.backends.mps.is_available():
        table.add_row("mps", "Apple GPU")
    table.add_row("default", resolve_device("auto"))
    table.add_row("C++ compiler", "available" if has_compiler() else "not available: --compile on falls back to eager mode")
    out.print(table)
    return []


def _store() -> list[str]:
    from vitkit.data.store import read_store, store_directory

    folder = store_directory()
    title = f"dataset store {printable(folder)}"
    table = Table("dataset", "train", "test", "shape", title=cell(title), title_justify="left")
    broken = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            stored = read_store(path)
        except DatasetError as error:
            broken.append(str(error))
            continue
        train, test = stored.train, stored.test
        table.add_row(cell(path.stem), str(len(train)), str(len(test)), "×".join(map(str, train.images.shape[1:])))
    out.print(table if table.rows else f"{title}: empty")
    return broken


__all__ = ["doctor"]
