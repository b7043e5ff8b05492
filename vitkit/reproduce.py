"""Run a finished run again: its copy of the recipe, its arguments and seed, and a verdict for each metric."""

import hashlib
import inspect
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vitkit.component_arguments import fits
from vitkit.errors import RunDirectoryError, RunError, UsageError, printable
from vitkit.hub.client import PREFIX, fetch_run
from vitkit.hub.files import ORIGIN, RECIPE
from vitkit.runs.directory import MODULES, fresh, read_summary
from vitkit.runs.settings import SETTINGS, requested
from vitkit.runs.summary import validate_summary
from vitkit.training.accelerator import resolve_device, resolve_precision
from vitkit.training.launch import execute
from vitkit.training.recipe import Recipe, typed

MAX_CODE_BYTES = 2**20
"""Longer code is refused, because nobody would read it before it runs."""
REPEATED = ("seed", "grad_accum", "compile", "precision")
"""Settings that a reproduction takes from the recorded run."""
QUANTILE = 1.96
"""Quantile of the normal distribution: |x| of a standard normal variable is smaller in 95 % of cases."""
RELATIVE = 0.05
"""Tolerance of a metric that is not a proportion, as a share of its recorded value."""


@dataclass(frozen=True)
class Verdict:
    """A recorded and a reproduced value, their largest allowed distance and its rule. A value is None if it was not finite."""

    metric: str
    recorded: float | None
    reproduced: float | None
    tolerance: float
    rule: str

    @property
    def agrees(self) -> bool:
        if self.recorded is None or self.reproduced is None:
            return self.recorded is self.reproduced
        return abs(self.reproduced - self.recorded) <= self.tolerance


@dataclass(frozen=True)
class Reproduction:
    """The new run's directory, a verdict for each metric, and the differences between the circumstances of the two runs."""

    directory: Path
    verdicts: list[Verdict]
    differences: list[str]

    @property
    def agrees(self) -> bool:
        return bool(self.verdicts) and all(verdict.agrees for verdict in self.verdicts)


@dataclass(frozen=True)
class Code:
    """The code that is about to run: the bytes of the recipe and of the modules copied with it, as they were read.

    `files` are the bytes by path relative to `directory`, the recipe first; `foreign` is True if they came from the Hub.
    """

    source: str
    directory: Path
    files: Mapping[str, bytes]
    foreign: bool
    duration: str

    @property
    def warning(self) -> str:
        """The sentence that a person reads before the code runs; it is one line without control characters."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        path = printable(self.directory / RECIPE)
        modules = [f"{printable(name)} (SHA-256 {digest})" for name, digest in digests.items() if name != RECIPE]
        beside = f" and in {', '.join(modules)}" if modules else ""
        return (
            f"this runs the Python code in {path} (of {printable(self.source)}, SHA-256 {digests[RECIPE]}){beside}, with your rights"
            f"{self.duration}"
        )


def reproduce(
    source: str, *, out: Path | None = None, resume: bool = False, confirm: Callable[[Code], bool], console: Console
) -> Reproduction | None:
    """Run the recipe that a finished run keeps a copy of, with the run's arguments, in a new directory; compare the metrics.

    `source` is a run's directory, or `hf://OWNER/NAME` for a repository of the Hub; no other source is searched on the Hub.
    `resume` continues a reproduction that was stopped in `out`. The summary is validated and the recipe read first. `confirm` is
    then called with the code that will run; exactly these bytes run, even if the file changes in between. Returns None if
    `confirm` declines or the run is interrupted.

    Where processor, versions, threads and settings are those recorded, on a CPU, the numbers have to be equal. Elsewhere a
    proportion p of n samples may differ by 1.96·√(2·p̃·(1 − p̃)/n) with p̃ = (n·p + 2)/(n + 4) (Agresti and Coull, 1998), and another
    metric by 5 % of its value. Raises `UsageError` for a directory without a finished run or its recipe and for a summary that is
    not valid, `RunDirectoryError` if `out` holds nothing to resume, and `RecipeError` for a recipe with other flags than
    recorded.
    """
    if resume and out is None:
        raise UsageError("--resume continues a reproduction that was stopped: give its directory with --out")
    directory, foreign = _locate(source)
    summary = _validated(directory, read_summary(directory))
    code = Code(source, directory, _read_code(directory), foreign, _duration(summary))
    if not confirm(code):
        return None
    with _written(code.files) as path:
        recipe = Recipe(path, reserved=frozenset(SETTINGS), name=summary.get("recipe") or "")
        flags, settings = _flags(recipe, directory / RECIPE, summary), _settings(summary)
        command = shlex.join(["vitkit", "reproduce", source])
        if resume and out is not None and read_summary(out).get("command") != command:
            raise RunDirectoryError(f"{out} holds no reproduction of {printable(source)} that was stopped; leave out --resume to start one")
        out = out or fresh(recipe.name)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(summary["settings"].get("threads") or threads)
            exit_code = execute(recipe, {**settings, "out": out, "resume": resume, "command": command}, flags, console)
        finally:
            torch.set_num_threads(threads)
    return None if exit_code else _compared(out, summary, read_summary(out))


def tolerance(value: float, protocol: Mapping[str, Any] | None) -> tuple[float, str]:
    """The largest allowed distance of a reproduced value from the recorded one, and the rule; see `reproduce`.

    A metric is a proportion where its recorded protocol says so; runs of older versions did not record a kind; in
    these a metric with a chance level in (0, 1] is a proportion.
    """
    protocol = protocol or {}
    samples, chance = protocol.get("samples"), protocol.get("chance")
    is_proportion = protocol["kind"] == "proportion" if "kind" in protocol else chance is not None and 0.0 < chance <= 1.0
    if samples and is_proportion and 0.0 <= value <= 1.0:
        share = (samples * value + 2) / (samples + 4)
        return QUANTILE * math.sqrt(2 * share * (1 - share) / samples), f"95 % of {samples:,} samples"
    return RELATIVE * abs(value), f"{RELATIVE:.0%} of the value"


def _locate(source: str) -> tuple[Path, bool]:
    """The run's directory, and whether its files come from a Hub repository, also by `vitkit pull`."""
    if source.startswith(PREFIX):
        return fetch_run(source.removeprefix(PREFIX)), True
    directory = Path(source)
    if not directory.is_dir():
        hub = f"; for a repository of the Hub give {PREFIX}{printable(source)}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise UsageError(f"there is no directory {printable(source)}; give the directory of a finished run, such as runs/jepa{hub}")
    return directory, (directory / ORIGIN).exists()


def _read_code(directory: Path) -> dict[str, bytes]:
    """The recipe and the modules copied with it, each read once."""
    if not (directory / RECIPE).is_file():
        raise UsageError(
            f"{printable(directory)} holds no {RECIPE}: its run was not started with `vitkit run`, so it cannot be run again"
        )
    files: dict[str, bytes] = {}
    for path in (directory / RECIPE, *sorted((directory / MODULES).rglob("*.py"))):
        if not path.is_file():
            raise UsageError(f"{printable(path)} is no plain file; its code is not run")
        try:
            with path.open("rb") as file:
                content = file.read(MAX_CODE_BYTES + 1)
        except OSError as error:
            raise UsageError(f"cannot read {printable(path)}: {error.strerror or error}") from None
        files[path.relative_to(directory).as_posix()] = content
        if sum(map(len, files.values())) > MAX_CODE_BYTES:
            where = printable(directory)
            raise UsageError(f"the code in {where} is longer than {MAX_CODE_BYTES:,} bytes; it is too long to read, so it is not run")
    return files


@contextmanager
def _written(files: Mapping[str, bytes]) -> Iterator[Path]:
    """The recipe's path in a folder that only this user may enter, and that holds nothing but the given files."""
    with tempfile.TemporaryDirectory(prefix="vitkit-reproduce-") as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield Path(folder) / RECIPE


def _duration(summary: Mapping[str, Any]) -> str:
    return f"; it took {summary['seconds']:.0f} s on {printable(summary.get('machine'), 80)}" if summary.get("seconds") is not None else ""


def _flags(recipe: Recipe, path: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The requested values of the recipe's flags, as they were recorded; the recipe resolves them a second time."""
    recorded = recipe.rename(requested(summary))
    missing = [name for name in recipe.flags if name not in recorded]
    if missing:
        raise RunError(f"{printable(path)} takes {', '.join(missing)}, which the run's summary does not record")
    for name, flag in recipe.flags.items():
        if recorded[name] is not None and not fits(recorded[name], flag.annotation):
            where, expected = printable(path.with_name("summary.json")), inspect.formatannotation(flag.annotation)
            raise UsageError(f"{where} records {printable(repr(recorded[name]), 80)} for {name}; expected {expected}")
    return {name: typed(flag.annotation, recorded[name]) for name, flag in recipe.flags.items()}


def _settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded settings of the runner; device and precision are `auto` where this machine lacks the recorded ones."""
    recorded = summary["settings"]
    wanted = (recorded.get("device") or "auto").partition(":")[0]
    chosen = {name: recorded[name] for name in REPEATED if recorded.get(name) is not None}
    try:
        device = resolve_device(wanted)
        resolve_precision(chosen.get("precision", "auto"), device)
    except UsageError:
        device, chosen["precision"] = "auto", "auto"
    return {**chosen, "device": device}


def _compared(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> Reproduction:
    differences = [
        f"{name}: {before!r} then, {now!r} now"
        for name, before, now in (
            *(_pairs(old, new, "settings")), *(_pairs(old, new, "versions")), ("machine", old.get("machine"), new["machine"]),
            ("dataset", old["dataset"].get("name"), new["dataset"].get("name")),
        )
        if before != now
    ]  # fmt: skip
    exact = not differences and new["settings"]["device"] == "cpu"
    verdicts = []
    for metric in dict.fromkeys([*old["final"], *new["final"]]):
        recorded, reproduced = old["final"].get(metric), new["final"].get(metric)
        allowed = (0.0, "the same number") if exact or recorded is None else tolerance(recorded, old["protocols"].get(metric))
        verdicts.append(Verdict(metric, recorded, reproduced, *allowed))
    return Reproduction(out, verdicts, differences)


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> list[tuple[str, Any, Any]]:
    before, now = old[key], new.get(key, {})
    return [(name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now])]


def _validated(directory: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished run, each field of the expected type; objects that are missing are empty."""
    if summary.get("status") != "finished" or not isinstance(summary.get("final"), dict):
        raise UsageError(
            f"{printable(directory)} holds no finished run: there are no metrics to compare with; give a run's directory, "
            f"such as runs/jepa, or a repository {PREFIX}OWNER/NAME"
        )
    checked = dict(validate_summary(summary, printable(directory / "summary.json")))
    for name in ("settings", "dataset", "versions", "protocols", "arguments"):
        checked[name] = checked.get(name) or {}
    return checked


__all__ = ["Code", "Reproduction", "Verdict", "reproduce", "tolerance"]
