"""Parameters of one number: of shape `(1,)`, because FSDP2 refuses 0 dimensions; states saved with 0 still load."""

from functools import partial
from typing import Any

from torch import Tensor, nn


def load_scalars(module: nn.Module, *names: str) -> None:
    """Let `module.load_state_dict` read its parameters `names` of shape `(1,)` from states that hold them with 0 dimensions.

        self.log_scale = nn.Parameter(torch.zeros(1))
        load_scalars(self, "log_scale")
    """
    module.register_load_state_dict_pre_hook(partial(_reshape, names))  # a partial can be pickled, a closure cannot


def _reshape(names: tuple[str, ...], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in names:
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.ndim == 0:
            state[prefix + name] = value[None]


__all__ = ["load_scalars"]
