"""The device and the precision of a run, by accelerate."""

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from vitkit.errors import UsageError, nearest
from vitkit.training.processor import bf16_seconds_per_fp32_second, has_fast_bf16, keep_freed_memory

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")


def resolve_device(device: str) -> str:
    """`auto` is CUDA, then Apple's MPS, then the CPU; `UsageError` for a device that is not available."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    elif torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if device == "auto":
        return devices[0]
    if device not in devices:
        raise UsageError(f"--device {device}: this machine has {' and '.join(devices)}{nearest(device, devices)}")
    return device


def resolve_precision(precision: str, device: str) -> str:
    """`auto` is bf16 if the hardware has units for it, else fp32; `UsageError` for a precision that the device does not support."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if precision not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"--precision {precision}: expected auto, fp32, bf16 or fp16")
    if precision == "fp16" and device != "cuda":
        raise UsageError(f"--precision fp16 needs a CUDA device, this run is on {device}; use bf16 or fp32")
    if precision == "bf16" and device == "cpu" and not has_fast_bf16("cpu") and bf16_seconds_per_fp32_second() == math.inf:
        raise UsageError("--precision bf16: this processor cannot compute in bf16; use fp32")
    return precision


def resolve_trackers(report_to: list[str]) -> list[str]:
    """The trackers of accelerate in `report_to`, without "csv"; `UsageError` for an unknown or missing one."""
    trackers = [name for name in report_to if name not in ("", "csv")]
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in TRACKERS:
            raise UsageError(f"--report-to {name}: no such tracker{nearest(name, TRACKERS)}; csv, {', '.join(TRACKERS)}")
        if name not in installed:
            raise UsageError(f"--report-to {name} needs the package: pip install {name.replace('_', '-')}")
    return trackers


def make_accelerator(device: str, precision: str, trackers: list[str], directory: Path) -> Accelerator:
    """An accelerator for resolved `device`, `precision` and `trackers`."""
    # accelerate keeps one state for the process; a second run, for example in a notebook, may need another precision or device
    alone = PartialState._shared_state == {} or PartialState().num_processes == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    GradientState._reset_state()
    mixed = {"fp32": "no"}.get(precision, precision)
    if device == "cpu":
        keep_freed_memory()
    options: dict[str, Any] = {"log_with": trackers, "project_dir": directory / "trackers"} if trackers else {}
    try:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed, **options)
    except ValueError as error:
        raise UsageError(f"accelerate refuses the launcher's settings: {error}") from None
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and accelerator.num_processes > 1:
        _shard(accelerator)
    return accelerator


def _shard(accelerator: Accelerator) -> None:
    """Let `prepare` shard by FSDP2, as `accelerate launch --use_fsdp --fsdp_version 2` asks; `UsageError` for FSDP1."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise UsageError("FSDP1 flattens weights, and vitkit needs their shapes: launch with --fsdp_version 2")
    # Weights stay fp32, and autocast computes in the run's precision as it does without shards: losses have fp32 islands.
    plugin.mixed_precision_policy = None
    plugin.cpu_ram_efficient_loading = False  # every rank has built the same weights from the same seed
    # accelerate allows this only for GPUs; torch also shards over CPUs.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def shards(accelerator: Accelerator) -> bool:
    """Whether the accelerator shards models over ranks."""
    return bool(getattr(accelerator, "is_fsdp2", False))


__all__ = [
    "DeviceName", "Precision", "has_fast_bf16", "make_accelerator", "resolve_device", "resolve_precision", "resolve_trackers",
    "shards",
]  # fmt: skip
