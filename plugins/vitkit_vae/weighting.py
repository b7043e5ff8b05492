"""Several losses as one."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError

Mode = Literal["fixed", "uncertainty", "progressive"]
SEED_WEIGHTS = {"classification": 0.5, "triplet": 1.0, "reconstruction": 1.0, "kl": 0.01}


class MultiTaskLoss(nn.Module):
    """L = Σ_i r_i(t)·w_i·L_i over named losses, with t the number of training calls so far.

    `weights` are the w_i, at least 0; by `mode` they

    - "fixed": stay as they are;
    - "uncertainty": are learned for all but "kl": exp(−s_i)·L_i + ½·s_i in place of w_i·L_i, where s_i = log σ_i² starts at
      −log w_i (Kendall et al., arXiv 1705.07115: 1/σ²·L + log σ for a classification; its 1/(2σ²) for a regression only
      shifts s_i). The loss may then be negative;
    - "progressive": come in one after another in the order of `weights`, each linearly over `stage` calls and after the one
      before it; the first is there from the start. Classification first, by default.

    Where `warmup` names calls, "kl" in every mode grows linearly over so many of them (Bowman et al., arXiv 1511.06349).
    r_i = 1 otherwise, and outside training. Call: {name: scalar L_i} → {"loss", name: L_i, ...}, and with learned weights
    "weight_<name>" = exp(−s_i). A name that is not given does not count; one with weight 0 does not either.

    Ranks: L_i that are the same everywhere give the same loss everywhere. Raises `UsageError` for another mode, weights that
    are negative, not finite or all 0, negative counts of calls, and a loss without a weight.
    """

    vitkit_architecture: ClassVar = {"weights": {r"[a-z_]+": float}}

    calls: Tensor

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        mode: Mode = "fixed",
        *,
        warmup: int = 0,
        stage: int = 1000,
    ) -> None:
        super().__init__()
        self.weights = dict(SEED_WEIGHTS if weights is None else weights)
        if mode not in get_args(Mode):
            raise UsageError(f"mode is {mode!r}, expected one of {', '.join(map(repr, get_args(Mode)))}")
        wrong = {name: weight for name, weight in self.weights.items() if not (math.isfinite(weight) and weight >= 0)}
        if wrong or not any(self.weights.values()):
            raise UsageError(f"weights are {self.weights}, expected finite numbers of at least 0, one of them above")
        if warmup < 0 or stage < 1:
            raise UsageError(f"warmup is {warmup} and stage {stage}, expected calls of at least 0 and 1")
        self.mode, self.warmup, self.stage = mode, warmup, stage
        self.used = [name for name, weight in self.weights.items() if weight]
        learned = [name for name in self.used if name != "kl"] if mode == "uncertainty" else []
        self.log_variances = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(-math.log(self.weights[name]))) for name in learned}
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"mode": "uncertainty"}, {"parts": {name: torch.rand(()) for name in SEED_WEIGHTS}}

    def forward(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        unknown = [name for name in parts if name not in self.weights]
        if unknown:
            raise UsageError(f"no weight for {', '.join(map(repr, unknown))}; weights: {', '.join(self.weights)}")
        counted = [name for name in self.used if name in parts]
        terms, learned = [], {}
        for name in counted:
            ramp = self._ramp(name)
            if name in self.log_variances:
                s = self.log_variances[name]
                terms.append((-s).exp() * parts[name] + 0.5 * s)
                learned[f"weight_{name}"] = (-s).exp().detach()
            else:
                terms.append(ramp * self.weights[name] * parts[name])
        if self.training:
            self.calls += 1
        total = torch.stack(terms).sum() if terms else torch.zeros(())
        return {"loss": total, **parts, **learned}

    def _ramp(self, name: str) -> Tensor | float:
        """r(t) in [0, 1]."""
        if not self.training:
            return 1.0
        ramp: Tensor | float = 1.0
        if name == "kl" and self.warmup:
            ramp = (self.calls / self.warmup).clamp(max=1)
        place = self.used.index(name)
        if self.mode == "progressive" and place:
            ramp = ramp * (self.calls / self.stage - place + 1).clamp(0, 1)
        return ramp
