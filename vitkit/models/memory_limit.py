"""Limits on the memory that a factory may take while it builds a component from untrusted arguments."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vitkit.errors import AmbiguousNameError, ArgumentsError, PluginError, UnknownNameError, UsageError

META = torch.device("meta")
FEW_TENSORS, TENSORS_PER_SAVED = 256, 16
"""Tensors that building may make: a fixed number and a number per saved tensor, for masks, tables and parts that are replaced."""
FEW_BYTES, BYTES_PER_SAVED = 256 * 2**20, 4
"""Bytes that building may take: a fixed number and a number per saved byte."""


class MemoryLimit(TorchDispatchMode):
    """A context in which a thread may make tensors of at most `most` bytes together and at most `tensors` tensors; else `UsageError`.

    The size of a result is known before its memory is taken, from the same operation on the meta device. `exceeded` keeps the
    reason once a limit was reached, because a factory may replace the error by another one. Random numbers come from the context's
    own generator. Other threads are not affected.

    With `plan=True` every operation runs on the meta device only: no memory is taken and nothing is computed.
    """

    def __init__(self, most: int, tensors: int | None = None, *, plan: bool = False) -> None:
        super().__init__()
        self.most, self.tensors, self.plan = most, tensors, plan
        self.made_bytes, self.made_tensors, self.exceeded = 0, 0, ""
        self.generator = torch.Generator().manual_seed(0)

    @classmethod
    def of_saved(cls, size: int, tensors: int, *, plan: bool = False) -> "MemoryLimit":
        """The limits of building a model whose weights have `size` bytes in `tensors` tensors."""
        return cls(FEW_BYTES + BYTES_PER_SAVED * size, FEW_TENSORS + TENSORS_PER_SAVED * tensors, plan=plan)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        names = _argument_names(func)
        if self.plan:
            if "generator" in names and func._schema.is_mutable:  # a random fill changes no size
                return args[0]
            result = self._on_meta(func, names, args, kwargs)
            self._count(func, result)
            return result
        if _returns_memory(func):
            try:
                planned = self._on_meta(func, names, args, kwargs)
            except (NotImplementedError, RuntimeError, TypeError):  # the operation itself raises, or sizes depend on values
                planned = None
            self._count(func, planned)
        if "generator" not in names and "generator" in func.overloadpacket.overloads():
            func, names = func.overloadpacket.generator, (*names, "generator")
        if "generator" in names and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)

    def _on_meta(self, func: Any, names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
        if "device" in names:
            kwargs["device"] = META
            kwargs.pop("pin_memory", None)
        kwargs.pop("generator", None)
        return func(*args, **kwargs)

    def _count(self, func: Any, result: Any) -> None:
        if self.exceeded:
            raise UsageError(self.exceeded)
        if not _returns_memory(func):
            return
        results = result if isinstance(result, list | tuple) else [result]
        sizes = [tensor.nbytes for tensor in results if isinstance(tensor, Tensor)]
        if _makes(func):
            self.made_bytes += sum(sizes)
            self.made_tensors += 1
        if max([self.made_bytes, *sizes]) > self.most:
            self.exceeded = f"it takes more than {self.most:,} bytes, far beyond the weights that were saved"
        elif self.tensors is not None and self.made_tensors > self.tensors:
            self.exceeded = f"it makes more than {self.tensors:,} tensors, far beyond the weights that were saved"
        if self.exceeded:
            raise UsageError(self.exceeded)


def plan(build: Callable[[], Any], limit: MemoryLimit) -> Any:
    """`build()` on the meta device, or None if that fails. Raises `UsageError` beyond the limit, and the errors of the registry.

    A factory that reads values while it builds fails on the meta device. Its errors are not raised: a real build shows them.
    """
    try:
        with limit:
            return build()
    except (ArgumentsError, UnknownNameError, AmbiguousNameError, PluginError):
        raise
    except Exception:
        if limit.exceeded:
            raise UsageError(limit.exceeded) from None
        return None


def state_shapes(module: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Shape and dtype of every saved tensor of a module; None if a shape is not known before its first call."""
    if not isinstance(module, nn.Module):
        return None
    state = module.state_dict()
    if not all(isinstance(value, Tensor) and not nn.parameter.is_lazy(value) for value in state.values()):
        return None
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.device == META else torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META
    )  # fmt: skip


@cache
def _argument_names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


@cache
def _makes(func: Any) -> bool:
    """Whether an operation takes no tensor and says on which device to make one: empty, zeros, rand, arange, ..."""
    return "device" in _argument_names(func) and not any("Tensor" in str(a.type) for a in func._schema.arguments)


@cache
def _returns_memory(func: Any) -> bool:
    """Whether the results of an operation are new tensors: neither views nor arguments that it changes."""
    return any(result.alias_info is None and "Tensor" in str(result.type) for result in func._schema.returns)


__all__ = ["MemoryLimit", "plan", "state_shapes"]
