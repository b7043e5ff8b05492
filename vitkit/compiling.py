"""When to compile, and falling back where it cannot be done."""

import shutil
import sys

from torch import nn


def has_compiler() -> bool:
    """Whether a C++ compiler is to be had: torch.compile needs one on the CPU."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl" if sys.platform == "win32" else "g++"))


def compiled(model: nn.Module) -> nn.Module:
    """`model`, compiled in place: parameter names stay as they are."""
    model.compile(dynamic=False)
    return model
