"""How much memory a factory may take that somebody else's arguments are given to."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from vitkit.errors import UsageError


class MemoryLimit(TorchDispatchMode):
    """Within it, tensors made out of nothing may hold `most` bytes together; `UsageError` before the first beyond.

    A width of a billion, or a billion blocks, would otherwise end the process before anybody can say why.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.made = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _makes(func) and str(kwargs.get("device")) != "meta":
            planned = func(*args, **{**kwargs, "device": "meta", "pin_memory": None})
            self.made += planned.nbytes if isinstance(planned, Tensor) else 0
            if self.made > self.most:
                raise UsageError(f"it takes more than {self.most:,} bytes, far beyond the weights that were saved")
        return func(*args, **kwargs)


def check_size(build: Callable[[], Any], most: int, parameters: int) -> None:
    """Build without memory; `UsageError` for a parameter or buffer of more than `most` bytes, or too many parameters.

    What a buffer is computed from may be small, and blocks without end may be small too. A factory that needs values while
    it builds is let through, and so are its own errors.
    """
    left = parameters

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UsageError(f"it has more than {parameters:,} parameters, far beyond the weights that were saved")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is ever computed with it
            built = build()
    except UsageError:
        raise
    except Exception:
        return
    finally:
        handle.remove()
    tensors = (*built.parameters(), *built.buffers()) if isinstance(built, nn.Module) else ()
    if any(tensor.nbytes > most for tensor in tensors if not nn.parameter.is_lazy(tensor)):
        raise UsageError(f"it takes more than {most:,} bytes, far beyond the weights that were saved")


def _makes(func: Any) -> bool:
    """Whether an operation takes no tensor and says on which device to make one: empty, zeros, rand, arange, ..."""
    arguments = func._schema.arguments
    names = {argument.name for argument in arguments}
    return {"device", "pin_memory"} <= names and not any("Tensor" in str(argument.type) for argument in arguments)


__all__ = ["MemoryLimit", "check_size"]
