"""The LeJEPA loss: the views of a sample agree, and embeddings are Gaussian."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError
from vitkit.validation import in_range
from vitkit_jepa.sigreg import SIGReg


class LeJEPALoss(nn.Module):
    """(1 − λ)·invariance + λ·SIGReg, with λ = `lamda` in [0, 1].

    Call: projections z `(v n k)` of v views of n samples → {"loss", "invariance", "sigreg"}.

        invariance = mean over views, samples and dimensions of (z_v − μ)²,  μ = mean over views of z_v.

    `present` `(v n)` bool is false for a view that a sample does not have. Such a view is left out of μ and of every mean.
    `SIGReg` gets the first `regularised` views (None: all; a negative number: all but the last ones). A view with few
    distinct values, for example the view of a label alone, cannot be Gaussian and should be left out.

    Ranks: the loss and its parts are those of the whole batch and equal on every rank. The parts of the ranks may differ in
    size. Gradients follow `vitkit.distributed.collectives`. Raises `UsageError` if `lamda` is outside [0, 1] or projections
    have another shape.

    Source: Balestriero and LeCun, LeJEPA, arXiv 2511.08544, λ = 0.05. As in lightly's `LeJEPALoss` the
    invariance is a mean over dimensions too (the paper's norm is k times that). In lightly the centre μ is the mean
    of global views only; here it is the mean of all views.
    """

    def __init__(self, lamda: float = 0.05, directions: int = 256, knots: int = 17) -> None:
        super().__init__()
        in_range(0, 1, lamda=lamda)
        self.lamda = lamda
        self.sigreg = SIGReg(directions, knots)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"directions": 16}, {"projections": torch.randn(2, samples, 8)}

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The values for embeddings that are all zero: no invariance loss, and SIGReg of a collapsed batch."""
        sigreg = self.sigreg.uninformed(batch_size)["sigreg"]
        return {"loss": self.lamda * sigreg, "invariance": 0.0, "sigreg": sigreg}

    def forward(
        self, projections: Tensor, *, present: Tensor | None = None, regularised: int | None = None
    ) -> dict[str, Tensor]:
        if projections.ndim != 3:
            raise UsageError(f"projections are {tuple(projections.shape)}, expected (views, samples, dim)")
        regularised_present = None if present is None else present[:regularised]
        sigreg = self.sigreg(projections[:regularised], present=regularised_present)["sigreg"]
        with torch.autocast(projections.device.type, enabled=False):
            invariance = _invariance(projections.float(), present)
        return {
            "loss": (1.0 - self.lamda) * invariance + self.lamda * sigreg,
            "invariance": invariance,
            "sigreg": sigreg,
        }


def _invariance(z: Tensor, present: Tensor | None) -> Tensor:
    weight = z.new_ones(z.shape[:2]) if present is None else present.to(z.dtype)  # (v n)
    centre = torch.einsum("vn,vnk->nk", weight, z) / weight.sum(dim=0).clamp(min=1)[:, None]
    squares = torch.einsum("vn,vn->", weight, (z - centre).square().mean(dim=-1))
    return all_reduce_sum(squares) / all_reduce_sum(weight.sum()).clamp(min=1)
