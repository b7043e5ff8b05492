"""An exponential moving average of a model's weights, also of sharded ones.

The arithmetic is that of `torch.optim.swa_utils`. Its `AveragedModel` is not used: it copies the module, which FSDP2 refuses
("FSDP does not support deepcopy"), it averages counters such as batch norm's `num_batches_tracked` as whole numbers, and it keeps a
copy of everything in the module, buffers that are not saved included.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitkit.distributed.fsdp import local, shard_state


class ModelEma:
    """θ̄ ← d_n·θ̄ + (1 − d_n)·θ over the tensors of a model's `state_dict`; the first update copies θ.

        d_n = min(`decay`, (1 + n) / (10 + n)) after n updates

    Early averages are short, so that a training of few steps does not end near the weights that it began with (as in TensorFlow's
    `ExponentialMovingAverage`). A decay of 0.99 is reached after 890 updates. Integer tensors, such as counters, are copied
    from the model. The average of a sharded model is sharded in the same way.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.updates, self.decay = 0, decay
        self._values: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's weights to the average, once a step of the optimiser."""
        pairs = [(local(old), local(new.detach())) for old, new in zip(self._values.values(), model.state_dict().values(), strict=True)]
        smooth = [pair for pair in pairs if self.updates and pair[0].is_floating_point()]
        if smooth:
            average = get_ema_multi_avg_fn(min(self.decay, (1 + self.updates) / (10 + self.updates)))
            average([old for old, _ in smooth], [new for _, new in smooth], self.updates)
        for old, new in pairs:
            if not (self.updates and old.is_floating_point()):
                old.copy_(new)
        self.updates += 1

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, for `model.load_state_dict`."""
        return self._values

    def state_dict(self) -> dict[str, Any]:
        """The state for resuming, with the keys of `AveragedModel`."""
        return {"n_averaged": self.updates, **{f"module.{name}": value for name, value in self._values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; raises `KeyError` or `RuntimeError` for a state of another model."""
        self.updates = int(state["n_averaged"])
        given = weights_of(state)
        if given.keys() != self._values.keys():
            raise KeyError(", ".join(sorted(given.keys() ^ self._values.keys())))
        for name, value in shard_state(given, self._values).items():
            local(self._values[name]).copy_(local(value))


def weights_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights in the result of `ModelEma.state_dict`, by the model's names."""
    return {name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"}


__all__ = ["ModelEma", "weights_of"]
