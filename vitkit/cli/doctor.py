"""`vitkit doctor`: what is installed, what is broken and why."""

import platform
import sys
import time
from collections.abc import Collection
from importlib.metadata import distributions

from rich.console import Console
from rich.table import Table

from vitkit import __version__
from vitkit.cli.plugin_commands import command_of, commands
from vitkit.errors import DatasetError, PluginError
from vitkit.registry import REGISTRIES, version_of

LIBRARIES = ("torch", "torchvision", "accelerate", "safetensors", "huggingface_hub", "einops", "numpy", "scikit-learn")
SLOW_IMPORT_SECONDS = 5.0


def examine(console: Console, own_commands: Collection[str] = ()) -> list[str]:
    """Print what is here and return a line for each thing that is broken; `own_commands` are vitkit's, which always win."""
    broken = _plugins(console, own_commands) + _unreadable_metadata()
    console.print(_versions())
    broken += _devices(console) + _store(console)
    if broken:
        console.print(f"\n[bold red]{len(broken)} broken:[/]")
        for line in broken:
            console.print(f"- {line}", markup=False)
    else:
        console.print("\n[bold green]nothing is broken[/]")
    return broken


def _plugins(console: Console, own_commands: Collection[str]) -> list[str]:
    broken: list[str] = []
    owners: dict[tuple[str, str], tuple[int, int]] = {}
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
            if time.perf_counter() - began > SLOW_IMPORT_SECONDS:
                notes.append(f"{entry.distribution} took {time.perf_counter() - began:.0f} s to import")
            if names.count(entry.name) > 1:
                notes.append(
                    f"{registry.kind} {entry.name!r} is registered by several distributions; "
                    f"{entry.distribution}:{entry.name} names this one"
                )
            if registry is commands and entry.name in own_commands:
                notes.append(
                    f"command {entry.name!r} of {entry.distribution} is hidden by vitkit's own; "
                    f"{entry.distribution}:{entry.name} runs it"
                )
            good, bad = owners.get((entry.distribution, entry.version), (0, 0))
            owners[(entry.distribution, entry.version)] = (good + 1 - fault, bad + fault)
    table = Table("distribution", "version", "registers", "broken", title="plugins", title_justify="left")
    for (name, number), (good, bad) in sorted(owners.items()):
        table.add_row(name, number, str(good), f"[red]{bad}[/]" if bad else "0")
    console.print(table)
    for line in notes:
        console.print(f"note: {line}", markup=False)
    return broken


def _unreadable_metadata() -> list[str]:
    broken = []
    for distribution in distributions():
        try:
            _ = distribution.entry_points
        except Exception as error:  # whatever a damaged file makes the parser raise
            name = getattr(distribution, "_path", "a distribution")
            broken.append(f"{name}: entry points cannot be read ({type(error).__name__}: {error}); reinstall it")
    return broken


def _versions() -> Table:
    table = Table(title="versions", title_justify="left", show_header=False)
    table.add_row("vitkit", __version__)
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    for name in LIBRARIES:
        table.add_row(name, version_of(name) or "[red]not installed[/]")
    return table


def _devices(console: Console) -> list[str]:
    try:
        import torch

        from vitkit.training.accelerator import has_fast_bf16, resolve_device
        from vitkit.training.compile import has_compiler
    except Exception as error:
        return [f"torch cannot be imported: {type(error).__name__}: {error}; pip install --force-reinstall torch"]
    table = Table(title="devices", title_justify="left", show_header=False)
    bf16 = {True: "bf16 in hardware", False: "no bf16 in hardware: fp32 is the default"}
    table.add_row("cpu", f"{torch.get_num_threads()} threads, {bf16[has_fast_bf16('cpu')]}")
    for index in range(torch.cuda.device_count()):
        table.add_row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {bf16[has_fast_bf16('cuda')]}")
    if torch.backends.mps.is_available():
        table.add_row("mps", "Apple GPU")
    table.add_row("default", resolve_device("auto"))
    table.add_row("C++ compiler", "found" if has_compiler() else "none: --compile falls back to eager")
    console.print(table)
    return []


def _store(console: Console) -> list[str]:
    from vitkit.data.store import read_store, store_directory

    folder = store_directory()
    table = Table("dataset", "train", "test", "shape", title=f"dataset store {folder}", title_justify="left")
    broken = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            stored = read_store(path)
        except DatasetError as error:
            broken.append(str(error))
            continue
        train, test = stored.train, stored.test
        table.add_row(path.stem, str(len(train)), str(len(test)), "×".join(map(str, train.images.shape[1:])))
    console.print(table if table.rows else f"dataset store {folder}: empty")
    return broken
