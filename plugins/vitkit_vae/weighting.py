"""Several losses as one weighted sum."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vitkit.distributed import load_scalars
from vitkit.errors import UsageError
from vitkit.validation import at_least, one_of

Mode = Literal["fixed", "uncertainty", "progressive"]
REFERENCE_WEIGHTS = {"classification": 0.5, "triplet": 1.0, "reconstruction": 1.0, "kl": 0.01}


class MultiTaskLoss(nn.Module):
    """L = Σ_i r_i(t)·w_i·L_i over named losses. t is the training step: 0, until `set_step` sets it (`run.fit` calls it).

    `weights` are the w_i, each at least 0. `mode` defines how weights change during training:

    - "fixed": weights do not change.
    - "uncertainty": all weights except that of "kl" are learned. exp(−s_i)·L_i + ½·s_i replaces w_i·L_i, where s_i = log
      σ_i² starts at −log w_i (Kendall et al., arXiv 1705.07115: 1/σ²·L + log σ for a classification; the paper's 1/(2σ²)
      for a regression only shifts s_i). The loss can become negative.
    - "progressive": losses start one after another, in the order of `weights`. The first has its full weight from the
      start. The weight of each other loss grows linearly over `stage` steps, after that of the loss before it. By default
      the classification is first.

    With `warmup` > 0 the weight of "kl" grows linearly over the first `warmup` steps, in every mode (Bowman et al., arXiv
    1511.06349). In all other cases, and outside training, r_i = 1. Call: {name: scalar L_i} → {"loss", name: L_i, ...}, and
    with learned weights "weight_<name>" = exp(−s_i). A loss that is not given, or has weight 0, is not part of the sum.

    Ranks: the loss is equal on every rank if the L_i are. Raises `UsageError` if the mode is unknown, weights are negative,
    not finite or all 0, a number of steps is negative, or a loss has no weight.
    """

    vitkit_architecture: ClassVar = {"weights": {r"[a-z_]+": float}}

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        mode: Mode = "fixed",
        *,
        warmup: int = 0,
        stage: int = 1000,
    ) -> None:
        super().__init__()
        self.weights = dict(REFERENCE_WEIGHTS if weights is None else weights)
        one_of(get_args(Mode), mode=mode)
        invalid = [name for name, weight in self.weights.items() if not (math.isfinite(weight) and weight >= 0)]
        if invalid or not any(self.weights.values()):
            raise UsageError(f"weights are {self.weights}; expected finite numbers of at least 0, one of them above 0")
        at_least(0, warmup=warmup)
        at_least(1, stage=stage)
        self.mode, self.warmup, self.stage = mode, warmup, stage
        self.used = [name for name, weight in self.weights.items() if weight]
        learned = [name for name in self.used if name != "kl"] if mode == "uncertainty" else []
        self.log_variances = nn.ParameterDict(  # of shape (1,): FSDP2 refuses parameters of 0 dimensions
            {name: nn.Parameter(torch.full((1,), -math.log(self.weights[name]))) for name in learned}
        )
        load_scalars(self, *(f"log_variances.{name}" for name in learned))
        self.step = 0
        self.register_load_state_dict_pre_hook(_drop_calls)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"mode": "uncertainty"}, {"parts": {name: torch.rand(()) for name in REFERENCE_WEIGHTS}}

    def uninformed(self, batch_size: int, parts: Mapping[str, float] | None = None) -> dict[str, float]:
        """The uninformed values `parts`, and with fixed weights their weighted sum "loss" if all used parts are given.

        If weights change during training, the sum has no fixed value.
        """
        given = dict(parts or {})
        if self.mode == "fixed" and given and set(self.used) <= given.keys():
            given["loss"] = sum(self.weights[name] * given[name] for name in self.used)
        return given

    def forward(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        unknown = [name for name in parts if name not in self.weights]
        if unknown:
            raise UsageError(f"no weight for {', '.join(map(repr, unknown))}; weights: {', '.join(self.weights)}")
        terms, learned = [], {}
        for name in (name for name in self.used if name in parts):
            if name in self.log_variances:
                s = self.log_variances[name][0]
                terms.append((-s).exp() * parts[name] + 0.5 * s)
                learned[f"weight_{name}"] = (-s).exp().detach()
            else:
                terms.append(self._ramp(name) * self.weights[name] * parts[name])
        total = torch.stack(terms).sum() if terms else torch.zeros(())
        return {"loss": total, **parts, **learned}

    def set_step(self, step: int, total: int) -> None:
        """Set t, the step of the optimiser that comes next."""
        self.step = step

    def _ramp(self, name: str) -> float:
        """r(t) in [0, 1]."""
        if not self.training:
            return 1.0
        ramp = 1.0
        if name == "kl" and self.warmup:
            ramp = min(self.step / self.warmup, 1.0)
        place = self.used.index(name)
        if self.mode == "progressive" and place:
            ramp *= min(max(self.step / self.stage - place + 1, 0.0), 1.0)
        return ramp


def _drop_calls(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}calls", None)  # earlier versions counted the calls
