"""An exponential moving average of a model's weights, also of sharded ones."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.distributed.fsdp import local, shard_state


class ModelEma:
    """θ̄ ← d·θ̄ + (1 − d)·θ over what a model's `state_dict` holds; the first update takes θ as it is.

    Tensors that hold no real numbers, counters say, are the model's latest. A sharded model's average is sharded likewise.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._values: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Once a step of the optimiser."""
        pairs = [(local(old), local(new.detach())) for old, new in zip(self._values.values(), model.state_dict().values(), strict=True)]
        smooth = [pair for pair in pairs if self.updates and pair[0].is_floating_point()]
        if smooth:
            torch._foreach_lerp_([old for old, _ in smooth], [new for _, new in smooth], 1.0 - self.decay)
        for old, new in pairs:
            if not (self.updates and old.is_floating_point()):
                old.copy_(new)
        self.updates += 1

    def weights(self) -> dict[str, Tensor]:
        """What to load into a model."""
        return self._values

    def state_dict(self) -> dict[str, Any]:
        """What to go on from."""
        return {"n_averaged": self.updates, **{f"module.{name}": value for name, value in self._values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; `KeyError` and `RuntimeError` where it is another model's."""
        self.updates = int(state["n_averaged"])
        given = weights_of(state)
        if given.keys() != self._values.keys():
            raise KeyError(", ".join(sorted(given.keys() ^ self._values.keys())))
        for name, value in shard_state(given, self._values).items():
            local(self._values[name]).copy_(local(value))


def weights_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights in what `ModelEma.state_dict` gave, by the model's own names."""
    return {name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"}


__all__ = ["ModelEma", "weights_of"]
