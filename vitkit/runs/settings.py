"""The settings that the runner adds to every recipe's flags, and the values that were requested for a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """One setting of the runner: the type that its flag parses, its default value and its help text."""

    annotation: Any
    default: Any
    help: str


SETTINGS: dict[str, Setting] = {
    "out": Setting(Path | None, None, "the run's directory  [default: runs/RECIPE/TIME]"),
    "seed": Setting(int, 0, "seed of every random choice"),
    "device": Setting(Literal["auto", "cpu", "cuda", "mps"], "auto", "auto: cuda if there is a CUDA GPU, else mps (Apple), else cpu"),
    "precision": Setting(Literal["auto", "fp32", "bf16", "fp16"], "auto", "auto: bf16 if the device computes fast in it, else fp32"),
    "compile": Setting(Literal["auto", "on", "off"], "auto", "torch.compile; auto: on CUDA in runs of at least 2,000 steps"),
    "resume": Setting(bool, False, "resume the run in --out (without --out: the newest unfinished run)"),
    "overwrite": Setting(bool, False, "replace the run in --out"),
    "grad_accum": Setting(int, 1, "batches per step; GradCacheable models join them before the loss, others average gradients"),
    "report_to": Setting(str, "csv", "trackers: csv and accelerate's, e.g. csv,tensorboard"),
    "dry_run": Setting(bool, False, "show every resolved value and build the model, but do not train"),
    "devices": Setting(int | None, None, "with --dry-run: estimate memory, FLOPs and time on this many devices"),
}

ONE_WAY = ("resume", "overwrite", "dry_run")
"""Switches without a `--no-` form."""

FREE = ("device", "compile", "report_to")
"""Settings that may change when a run is resumed."""


def requested(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The requested values of a run by name: the recipe's flags and the runner's settings, before they were resolved."""
    recorded = summary.get("requested")
    if isinstance(recorded, Mapping):
        return dict(recorded)
    settings = summary.get("settings", {})  # older summaries have no "requested"
    return {**summary.get("arguments", {}), **{name: settings[name] for name in ("seed", "precision", "grad_accum") if name in settings}}


__all__ = ["FREE", "ONE_WAY", "SETTINGS", "Setting", "requested"]
