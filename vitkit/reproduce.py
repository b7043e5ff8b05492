"""A finished run once more: its own copy of the recipe, arguments and seed, and a verdict for each metric."""

import hashlib
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vitkit.errors import RunDirectoryError, RunError, UsageError
from vitkit.hub.client import resolve
from vitkit.runs.directory import fresh, read_summary
from vitkit.runs.settings import SETTINGS, requested
from vitkit.training.accelerator import resolve_device, resolve_precision
from vitkit.training.launch import execute
from vitkit.training.recipe import Recipe, typed

RECIPE = "recipe.py"
QUANTILE = 1.96
"""Of the normal distribution: 95 % of the differences between two shares of the same true value are smaller."""
RELATIVE = 0.05
"""How far a metric that is no accuracy may be off, as a share of its recorded value."""


@dataclass(frozen=True)
class Verdict:
    """A recorded value, the one that was found, and how far apart they may be and why; None where there is none."""

    metric: str
    recorded: float | None
    found: float | None
    tolerance: float
    rule: str

    @property
    def agrees(self) -> bool:
        if self.recorded is None or self.found is None:
            return self.recorded is self.found  # a value that was not finite is recorded as none
        return abs(self.found - self.recorded) <= self.tolerance


@dataclass(frozen=True)
class Reproduction:
    """The new run's directory, a verdict for each metric, and what differs from the first run's circumstances."""

    directory: Path
    verdicts: list[Verdict]
    differences: list[str]

    @property
    def agrees(self) -> bool:
        return bool(self.verdicts) and all(verdict.agrees for verdict in self.verdicts)


def reproduce(
    source: str, *, out: Path | None = None, resume: bool = False, confirm: Callable[[str], bool], console: Console
) -> Reproduction | None:
    """Run the recipe that a finished run keeps a copy of, as that run did, in a new directory, and compare the metrics.

    `source` is a run's directory or a Hub repository; `resume` goes on with a reproduction of it in `out`. `confirm` is asked
    before any of its code runs, with a sentence that says whose it is; None where it declines or the run is interrupted.
    Where processor, versions, threads and
    settings are those recorded, on a CPU, the numbers have to be the same. Elsewhere an accuracy p of n samples may
    differ by 1.96·√(2·p̃·(1 − p̃)/n) with p̃ = (n·p + 2)/(n + 4) (Agresti and Coull, 1998), another metric by 5 % of
    its value. Raises `UsageError` for a directory without a finished run or its recipe, `RunDirectoryError` where there is
    nothing in `out` to resume, and `RecipeError` for a recipe that takes other flags than were recorded.
    """
    if resume and out is None:
        raise UsageError("--resume goes on with a reproduction that was stopped: give its directory with --out")
    directory = resolve(source, model_alone=False)
    summary = read_summary(directory)
    if summary.get("status") != "finished" or not isinstance(summary.get("final"), dict):
        raise UsageError(
            f"{directory} holds no finished run: there are no metrics to compare with; give a run's directory, "
            f"such as runs/jepa, or a repository OWNER/NAME"
        )
    path = directory / RECIPE
    if not path.is_file():
        raise UsageError(f"{directory} holds no {RECIPE}: its run was not started with `vitkit run`, so it cannot be run again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    took = f"it took {summary['seconds']:.0f} s on {summary.get('machine')}" if "seconds" in summary else ""
    if not confirm(f"this runs the Python code in {path} (of {source}, SHA-256 {digest}), with your rights; {took}"):
        return None
    recipe = Recipe(path, reserved=frozenset(SETTINGS), name=str(summary.get("recipe", "")))
    flags, settings = _flags(recipe, summary), _settings(summary)
    command = shlex.join(["vitkit", "reproduce", source])
    if resume and out is not None and read_summary(out).get("command") != command:
        raise RunDirectoryError(f"{out} holds no reproduction of {source} that was stopped; leave out --resume to start one")
    out = out or fresh(recipe.name)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, int(summary.get("settings", {}).get("threads", threads))))
        code = execute(recipe, {**settings, "out": out, "resume": resume, "command": command}, flags, console)
    finally:
        torch.set_num_threads(threads)
    return None if code else _compared(out, summary, read_summary(out))


def tolerance(value: float, protocol: Mapping[str, Any] | None) -> tuple[float, str]:
    """How far a reproduced value may be from the recorded one, and by which rule; see `reproduce`."""
    samples, chance = (protocol or {}).get("samples"), (protocol or {}).get("chance")
    if samples and chance is not None and 0.0 < chance <= 1.0 and 0.0 <= value <= 1.0:
        share = (samples * value + 2) / (samples + 4)
        return QUANTILE * math.sqrt(2 * share * (1 - share) / samples), f"95 % of {samples:,} samples"
    return RELATIVE * abs(value), f"{RELATIVE:.0%} of the value"


def _flags(recipe: Recipe, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for as the recipe's flags; what it made of that is its own to find again."""
    recorded = requested(summary)
    missing = [name for name in recipe.flags if name not in recorded]
    if missing:
        raise RunError(f"{recipe.path} takes {', '.join(missing)}, which the run's summary does not record")
    return {name: typed(flag.annotation, recorded[name]) for name, flag in recipe.flags.items()}


def _settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The runner's settings as recorded; the device and precision that this machine has where it lacks those."""
    recorded = summary.get("settings", {})
    wanted = str(recorded.get("device", "auto")).partition(":")[0]
    chosen = {name: recorded[name] for name in ("seed", "grad_accum", "compile", "precision") if name in recorded}
    try:
        device = resolve_device(wanted)
        resolve_precision(chosen.get("precision", "auto"), device)
    except UsageError:
        device, chosen["precision"] = "auto", "auto"
    return {**chosen, "device": device}


def _compared(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> Reproduction:
    differences = [
        f"{what}: {before!r} then, {now!r} now"
        for what, before, now in (
            *(_pairs(old, new, "settings")), *(_pairs(old, new, "versions")), ("machine", old.get("machine"), new["machine"]),
            ("dataset", old.get("dataset", {}).get("name"), new["dataset"].get("name")),
        )
        if before != now
    ]  # fmt: skip
    exact = not differences and new["settings"]["device"] == "cpu"
    protocols = old.get("protocols", {})
    verdicts = []
    for metric in dict.fromkeys([*old["final"], *new["final"]]):
        recorded, found = old["final"].get(metric), new["final"].get(metric)
        allowed = (0.0, "the same number") if exact or recorded is None else tolerance(recorded, protocols.get(metric))
        verdicts.append(Verdict(metric, recorded, found, *allowed))
    return Reproduction(out, verdicts, differences)


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> list[tuple[str, Any, Any]]:
    before, now = old.get(key, {}), new.get(key, {})
    return [(name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now])]


__all__ = ["Reproduction", "Verdict", "reproduce", "tolerance"]
