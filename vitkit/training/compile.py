"""Compiling a model, if that saves time and a compiler is available."""

import shutil
import sys

from torch import nn

PAYS_AFTER_STEPS = 2_000
"""Compiling takes one or two minutes on a GPU; with steps a fifth faster, this many steps save that time."""


def has_compiler() -> bool:
    """Whether a C++ compiler is available: torch.compile needs one."""
    names = ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++")
    return any(shutil.which(name) for name in names)


def compile_for(model: nn.Module, setting: str, *, device: str, steps: int) -> str:
    """Compile `model` in place if `setting` (auto, on or off) asks for it; returns a line with the decision, "" for off.

    auto compiles on CUDA in runs of at least 2,000 steps. On a CPU it does not, however long the run: the vision
    transformer's own block is not compiled there, and the rest gains 1 to 2 % of a step.
    """
    if setting == "off":
        return ""
    if setting == "auto" and device != "cuda":
        return f"not compiled: on {device} that saves almost no time in {steps:,} steps; --compile on compiles it anyway"
    if setting == "auto" and steps < PAYS_AFTER_STEPS:
        return (
            f"not compiled: this run has {steps:,} steps, and compiling saves time from {PAYS_AFTER_STEPS:,} on; --compile on "
            f"compiles it anyway"
        )
    if not has_compiler():
        return "not compiled: no C++ compiler is installed; install g++ or clang++, or give --compile off"
    model.compile(dynamic=False)
    return f"compiled during the first of {steps:,} steps, which takes longer"
