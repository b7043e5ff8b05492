"""What a run's summary says besides its own numbers: the best of each metric, versions and the machine; and rows as CSV."""

import contextlib
import csv
import io
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitkit.files import write_text
from vitkit.registry import version_of


def lower_is_better(name: str) -> bool:
    """Whether a metric is an error, a cost or a rank: its last word is loss, mse, error, rank, ..., or one is `swapped`."""
    words = name.lower().split("_")
    costs = ("loss", "mse", "mae", "rmse", "error", "nll", "perplexity", "seconds", "rank")
    return words[-1] in costs or "swapped" in words


def best_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The best value of each metric and the epoch it was reached in; what is not finite is never best."""
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("epoch", "step") or value is None or not math.isfinite(value):
                continue
            sign = -1.0 if lower_is_better(name) else 1.0
            if name not in best or sign * value > sign * best[name]["value"]:
                best[name] = {"value": value, "epoch": row["epoch"]}
    return best


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows under the columns that any of them has; written whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that numbers depend on."""
    names = ("vitkit", "torch", "torchvision", "accelerate", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
