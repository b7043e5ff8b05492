"""A device without fp64, pretended on the CPU: what Apple's MPS refuses is refused, and what is not on it stays apart from it."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")
ASKS = {Tensor.device.__get__: MPS}


class Elsewhere(Tensor):
    """A tensor on the pretended device; `.cpu()`, numbers and lists come back from it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ASKS:
            return ASKS[func]
        with torch._C.DisableTorchFunctionSubclass():
            flat = [item for value in (*args, *kwargs.values()) for item in (value if isinstance(value, (list, tuple)) else [value])]
            if any(isinstance(item, Tensor) and not isinstance(item, Elsewhere) and item.ndim for item in flat):
                raise RuntimeError(f"{func} mixes tensors of two devices")
            found = func(*args, **kwargs)
        return found.as_subclass(Tensor) if func is Tensor.cpu else _put(found)


def _put(found):
    if isinstance(found, (list, tuple)) and any(isinstance(item, Tensor) for item in found):
        return type(found)([_put(item) for item in found])
    if not isinstance(found, Tensor):
        return found
    if found.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return found.as_subclass(Elsewhere)


def elsewhere(tensor):
    """The tensor, on the pretended device."""
    return _put(tensor)


class Pretending(TorchFunctionMode):
    """Within it tensors can be made on, and moved to, the pretended device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.to and MPS in (*args[1:], kwargs.get("device")):
            return _put(args[0])
        if torch.device(kwargs.get("device") or "cpu") == MPS:
            return _put(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)
