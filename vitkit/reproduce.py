"""Run a finished run again: its copy of the recipe, its arguments and seed, and a verdict for each metric."""

import hashlib
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

from vitkit.errors import RunDirectoryError, RunError, UsageError, printable
from vitkit.hub.client import fetch_run
from vitkit.runs.directory import MODULES, fresh, read_summary
from vitkit.runs.settings import SETTINGS, requested
from vitkit.training.accelerator import resolve_device, resolve_precision
from vitkit.training.launch import execute
from vitkit.training.recipe import Recipe, typed

RECIPE = "recipe.py"
RECIPE_BYTES = 2**20
"""A longer recipe is refused: nobody could read it before its code runs."""
HUB_PREFIX = "hf://"
REPEATED = ("seed", "grad_accum", "compile", "precision")
"""Settings that a reproduction takes from the recorded run."""
QUANTILE = 1.96
"""Of the normal distribution: 95 % of the differences between two proportions of the same true value are smaller."""
RELATIVE = 0.05
"""Tolerance of a metric that is not a proportion, as a share of its recorded value."""


@dataclass(frozen=True)
class Verdict:
    """A recorded value, the reproduced value, their largest allowed distance and its rule. A value that was not finite is None."""

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
    """The recipe that is about to run: its bytes as they were read, where they were read, and whether they came from the Hub.

    `modules` are the modules that the run copied with the recipe, by their paths relative to the run's directory.
    """

    source: str
    path: Path
    content: bytes
    modules: Mapping[str, bytes]
    foreign: bool
    duration: str

    @property
    def warning(self) -> str:
        """The sentence that a person reads before the code runs; it fits into one line and holds no control characters."""
        digest = hashlib.sha256(self.content)
        for name, content in self.modules.items():
            digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
        beside = f" and {len(self.modules)} modules in {MODULES}/" if self.modules else ""
        return (
            f"this runs the Python code in {printable(self.path)}{beside} (of {printable(self.source)}, SHA-256 "
            f"{digest.hexdigest()}), with your rights{self.duration}"
        )


def reproduce(
    source: str, *, out: Path | None = None, resume: bool = False, confirm: Callable[[Code], bool], console: Console
) -> Reproduction | None:
    """Run the recipe that a finished run keeps a copy of, with the run's arguments, in a new directory; compare the metrics.

    `source` is a run's directory, or `hf://OWNER/NAME` for a repository of the Hub; no other source is looked for on the Hub.
    `resume` continues a reproduction that was stopped in `out`. The summary is validated and the recipe read first. `confirm` is
    then asked with the code that will run; exactly these bytes run, whatever happens to the file meanwhile. Returns None where
    `confirm` declines or the run is interrupted.

    Where processor, versions, threads and settings are those recorded, on a CPU, the numbers have to be equal. Elsewhere a
    proportion p of n samples may differ by 1.96·√(2·p̃·(1 − p̃)/n) with p̃ = (n·p + 2)/(n + 4) (Agresti and Coull, 1998), and another
    metric by 5 % of its value. Raises `UsageError` for a directory without a finished run or its recipe and for a summary that is
    not valid, `RunDirectoryError` where `out` holds nothing to resume, and `RecipeError` for a recipe with other flags than
    recorded.
    """
    if resume and out is None:
        raise UsageError("--resume continues a reproduction that was stopped: give its directory with --out")
    directory, foreign = _locate(source)
    summary = _validated(directory, read_summary(directory))
    path = directory / RECIPE
    code = Code(source, path, _read_recipe(directory), _read_modules(directory), foreign, _duration(summary))
    if not confirm(code):
        return None
    with _written({RECIPE: code.content, **code.modules}) as path:
        recipe = Recipe(path, reserved=frozenset(SETTINGS), name=summary["recipe"])
        flags, settings = _flags(recipe, code.path, summary), _settings(summary)
        command = shlex.join(["vitkit", "reproduce", source])
        if resume and out is not None and read_summary(out).get("command") != command:
            raise RunDirectoryError(f"{out} holds no reproduction of {printable(source)} that was stopped; leave out --resume to start one")
        out = out or fresh(recipe.name)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(summary["settings"].get("threads", threads))
            exit_code = execute(recipe, {**settings, "out": out, "resume": resume, "command": command}, flags, console)
        finally:
            torch.set_num_threads(threads)
    return None if exit_code else _compared(out, summary, read_summary(out))


def tolerance(value: float, protocol: Mapping[str, Any] | None) -> tuple[float, str]:
    """The largest allowed distance of a reproduced value from the recorded one, and the rule; see `reproduce`.

    A metric is a proportion where its recorded protocol says so; runs of older versions did not record a kind, and there a
    metric with a chance level in (0, 1] is one.
    """
    protocol = protocol or {}
    samples, chance = protocol.get("samples"), protocol.get("chance")
    is_proportion = protocol["kind"] == "proportion" if "kind" in protocol else chance is not None and 0.0 < chance <= 1.0
    if samples and is_proportion and 0.0 <= value <= 1.0:
        share = (samples * value + 2) / (samples + 4)
        return QUANTILE * math.sqrt(2 * share * (1 - share) / samples), f"95 % of {samples:,} samples"
    return RELATIVE * abs(value), f"{RELATIVE:.0%} of the value"


def _locate(source: str) -> tuple[Path, bool]:
    """The run's directory, and whether it is a copy of a Hub repository."""
    if source.startswith(HUB_PREFIX):
        return fetch_run(source.removeprefix(HUB_PREFIX)), True
    directory = Path(source)
    if not directory.is_dir():
        hub = f"; for a repository of the Hub give {HUB_PREFIX}{printable(source)}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise UsageError(f"there is no directory {printable(source)}; give the directory of a finished run, such as runs/jepa{hub}")
    return directory, False


def _read_recipe(directory: Path) -> bytes:
    path = directory / RECIPE
    if not path.is_file():
        raise UsageError(
            f"{printable(directory)} holds no {RECIPE}: its run was not started with `vitkit run`, so it cannot be run again"
        )
    return _read_source(path)


def _read_modules(directory: Path) -> dict[str, bytes]:
    """The modules that the run copied with its recipe; links are left out."""
    paths = [path for path in sorted((directory / MODULES).rglob("*.py")) if path.is_file() and not path.is_symlink()]
    return {path.relative_to(directory).as_posix(): _read_source(path) for path in paths}


def _read_source(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(RECIPE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {printable(path)}: {error.strerror or error}") from None
    if len(content) > RECIPE_BYTES:
        raise UsageError(f"{printable(path)} is longer than {RECIPE_BYTES:,} bytes; a recipe that nobody can read is not run")
    return content


@contextmanager
def _written(files: Mapping[str, bytes]) -> Iterator[Path]:
    """The path of the recipe among these files, in a folder that only this user may enter and that holds nothing else."""
    with tempfile.TemporaryDirectory(prefix="vitkit-reproduce-") as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield Path(folder) / RECIPE


def _duration(summary: Mapping[str, Any]) -> str:
    return f"; it took {summary['seconds']:.0f} s on {printable(summary.get('machine'), 80)}" if "seconds" in summary else ""


def _flags(recipe: Recipe, path: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values of the recipe's flags, as they were asked for; the recipe resolves them anew."""
    recorded = requested(summary)
    missing = [name for name in recipe.flags if name not in recorded]
    if missing:
        raise RunError(f"{printable(path)} takes {', '.join(missing)}, which the run's summary does not record")
    return {name: typed(flag.annotation, recorded[name]) for name, flag in recipe.flags.items()}


def _settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded settings of the runner; device and precision are `auto` where this machine lacks the recorded ones."""
    recorded = summary["settings"]
    wanted = recorded.get("device", "auto").partition(":")[0]
    chosen = {name: recorded[name] for name in REPEATED if name in recorded}
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
    """The fields of a summary that a reproduction reads, each of the expected type; `UsageError` names the first that is not."""
    if summary.get("status") != "finished" or not isinstance(summary.get("final"), dict):
        raise UsageError(
            f"{printable(directory)} holds no finished run: there are no metrics to compare with; give a run's directory, "
            f"such as runs/jepa, or a repository {HUB_PREFIX}OWNER/NAME"
        )
    fields = {"settings": {}, "dataset": {}, "versions": {}, "protocols": {}, **summary}

    def expect(is_valid: bool, name: str, value: object, expected: str) -> None:
        if not is_valid:
            given = printable(repr(value), 80)
            raise UsageError(f"{printable(directory)}/summary.json: {printable(name, 80)} is {given}; expected {expected}")

    recipe = fields.get("recipe")
    is_name = isinstance(recipe, str) and re.fullmatch(r"\w[^/\\:]{0,99}", recipe) is not None and printable(recipe) == recipe
    expect(is_name, "recipe", recipe, "the name of a recipe, without folders")
    for name in ("final", "settings", "dataset", "versions", "protocols"):
        expect(isinstance(fields[name], dict), name, fields[name], "an object")
    for name in ("requested", "arguments"):
        expect(isinstance(fields.get(name), dict | None), name, fields.get(name), "an object")
    fields["arguments"] = fields.get("arguments") or {}
    for metric, value in fields["final"].items():
        expect(value is None or _is_number(value), f"final.{metric}", value, "a number")
    for metric, protocol in fields["protocols"].items():
        expect(isinstance(protocol, dict), f"protocols.{metric}", protocol, "an object")
        samples, chance = protocol.get("samples"), protocol.get("chance")
        expect(samples is None or (_is_whole(samples) and samples >= 0), f"protocols.{metric}.samples", samples, "a whole number")
        expect(chance is None or _is_number(chance), f"protocols.{metric}.chance", chance, "a number")
    if "seconds" in fields:
        expect(_is_number(fields["seconds"]), "seconds", fields["seconds"], "a number")
    settings = fields["settings"]
    for name, least, most in (("seed", 0, 2**63 - 1), ("grad_accum", 1, 10**6), ("threads", 1, 4096)):
        if name in settings:
            value = settings[name]
            expect(_is_whole(value) and least <= value <= most, f"settings.{name}", value, f"a whole number in [{least}, {most}]")
    for name in ("device", "precision", "compile"):
        if name in settings:
            expect(isinstance(settings[name], str), f"settings.{name}", settings[name], "a text")
    return fields


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["Code", "Reproduction", "Verdict", "reproduce", "tolerance"]
