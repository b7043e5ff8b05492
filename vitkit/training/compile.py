"""When compiling a model pays, and going on without where it cannot be done."""

import shutil
import sys

from torch import nn

PAYS_AFTER_STEPS = 2_000
"""On a GPU compiling takes a minute or two, which a training step that is a fifth faster earns back in so many."""


def has_compiler() -> bool:
    """Whether a C++ compiler is to be had: torch.compile needs one."""
    names = ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++")
    return any(shutil.which(name) for name in names)


def compile_for(model: nn.Module, setting: str, *, device: str, steps: int) -> str:
    """Compile `model` in place where `setting` (auto, on or off) asks for it; what was decided, in one line, for off "".

    auto compiles on CUDA in runs of at least 2,000 steps. On a CPU it does not, however long the run: the vision
    transformer's own block is not compiled there, and the rest gains 1 to 2 % of a step.
    """
    if setting == "off":
        return ""
    if setting == "auto" and device != "cuda":
        return f"not compiled: on {device} that gains next to nothing in {steps:,} steps; --compile on does it all the same"
    if setting == "auto" and steps < PAYS_AFTER_STEPS:
        return (
            f"not compiled: this run has {steps:,} steps, and compiling pays from {PAYS_AFTER_STEPS:,} on; --compile on does "
            f"it all the same"
        )
    if not has_compiler():
        return "not compiled: no C++ compiler was found; install g++ or clang++, or give --compile off"
    model.compile(dynamic=False)
    return f"compiled during the first of {steps:,} steps, which takes longer"
