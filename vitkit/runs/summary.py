"""The summary of a run: its fields and their check, the direction of a metric, the best values, versions and the machine."""

import contextlib
import csv
import io
import math
import platform
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from vitkit.errors import UsageError
from vitkit.files import write_text
from vitkit.registry import version_of

RECIPE_NAME = re.compile(r"[\w(][\w .()+-]{0,199}")
"""The name of a recipe becomes the name of a folder: no path separators, no control characters, no leading period."""
MAX_INTEGER = 2**63 - 1


class RunSummary(TypedDict, total=False):
    """The fields of `summary.json`. An unfinished run, or one of an older version, has fewer."""

    recipe: str
    status: str
    dataset: dict[str, Any]
    seed: int
    arguments: dict[str, Any]
    requested: dict[str, Any]
    settings: dict[str, Any]
    final: dict[str, float | None]
    best: dict[str, dict[str, Any]]
    protocols: dict[str, dict[str, Any]]
    references: dict[str, dict[str, float]]
    epochs: int
    seconds: float
    images_per_second: float
    started: str
    parameters: int
    steps: int
    versions: dict[str, str | None]
    machine: str
    command: str


# The expected type of each field by its path; `*` stands for every name. Numbers are finite, counts are whole and not negative.
_TYPES = {
    "recipe": "recipe", "status": "text", "started": "text", "machine": "text", "command": "text", "seed": "integer",
    "epochs": "count", "parameters": "count", "steps": "count", "seconds": "number", "images_per_second": "number",
    "dataset": "mapping", "dataset.name": "text", "dataset.classes": "texts", "dataset.train": "count", "dataset.val": "count",
    "dataset.test": "count", "arguments": "mapping", "requested": "mapping", "requested.seed": "integer", "settings": "mapping",
    "settings.seed": "integer", "settings.grad_accum": "count", "settings.threads": "threads", "settings.processes": "count",
    "settings.device": "text", "settings.precision": "text", "settings.compile": "text", "final": "mapping", "final.*": "number",
    "best": "mapping", "best.*": "mapping", "best.*.value": "number", "best.*.epoch": "count", "protocols": "mapping",
    "protocols.*": "mapping", "protocols.*.split": "text", "protocols.*.samples": "count", "protocols.*.chance": "number",
    "protocols.*.untrained": "number", "protocols.*.frozen": "text", "protocols.*.note": "text", "protocols.*.unit": "text",
    "protocols.*.kind": "kind", "protocols.*.direction": "direction", "references": "mapping", "references.*": "mapping",
    "references.*.*": "number", "versions": "mapping", "versions.*": "text",
}  # fmt: skip


def _is_integer(value: Any, least: int = -MAX_INTEGER, most: int = MAX_INTEGER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


_CHECKS = {
    "text": (lambda value: isinstance(value, str), "a text"),
    "texts": (lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of texts"),
    "integer": (_is_integer, "a whole number"),
    "count": (lambda value: _is_integer(value, least=0), "a whole number that is not negative"),
    "threads": (lambda value: _is_integer(value, 1, 4096), "a whole number from 1 to 4096"),
    "number": (
        lambda value: isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value),
        "a finite number",
    ),
    "mapping": (lambda value: isinstance(value, Mapping), "a mapping of names to values"),
    "recipe": (
        lambda value: isinstance(value, str) and RECIPE_NAME.fullmatch(value) is not None,
        "the name of a recipe: letters, digits, spaces and ._()+- without a path",
    ),
    "kind": (lambda value: value in ("proportion", "error", "score"), "proportion, error or score"),
    "direction": (lambda value: value in ("max", "min"), "max or min"),
}


def validate_summary(summary: Mapping[str, Any], source: str | Path = "summary.json") -> RunSummary:
    """Check the type of every field of a summary that is not trusted, before it is used.

    Missing fields and nulls pass, and so do fields that vitkit does not know. `source` names the file in the message.
    Raises `UsageError` for the first field with another type, or for a recipe name that could lead out of `runs/`.
    """
    for path, kind in _TYPES.items():
        for name, value in _values(summary, path.split(".")):
            accepts, expected = _CHECKS[kind]
            if value is not None and not accepts(value):
                problem = f"{name} is {repr(value)[:80]}; expected {expected}"
                raise UsageError(f"{source}: {problem}; the file is damaged, or vitkit did not write it")
    return cast(RunSummary, dict(summary))


def _values(value: Any, path: Sequence[str], name: str = "") -> list[tuple[str, Any]]:
    """Every value at a path, with its full name."""
    if not path:
        return [(name, value)]
    keys = (list(value) if path[0] == "*" else [path[0]] if path[0] in value else []) if isinstance(value, Mapping) else []
    return [pair for key in keys for pair in _values(value[key], path[1:], f"{name}.{key!s:.60}" if name else str(key))]


def direction(metric: str, protocols: Mapping[str, Any]) -> Literal["max", "min"]:
    """The direction in which a column improves: as its protocol records; `min` for the loss, `max` without a record."""
    protocol = protocols.get(metric)
    lower = isinstance(protocol, Mapping) and (protocol.get("direction") == "min" or protocol.get("kind") == "error")
    return "min" if lower or metric == "loss" else "max"


def best_of(rows: Sequence[Mapping[str, Any]], protocols: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The best value of each metric and the first epoch that reached it; a value that is not finite is never the best."""
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("epoch", "step") or value is None or not math.isfinite(value):
                continue
            sign = -1.0 if direction(name, protocols) == "min" else 1.0
            if name not in best or sign * value > sign * best[name]["value"]:
                best[name] = {"value": value, "epoch": row["epoch"]}
    return best


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the columns that any of them has; the file is written completely or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on."""
    names = ("vitkit", "torch", "torchvision", "accelerate", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def processor() -> str:
    """The processor's name where the system offers it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
