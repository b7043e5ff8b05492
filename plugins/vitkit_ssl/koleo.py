"""KoLeo: features keep a distance from their nearest neighbours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.distributed import all_gather, all_reduce_sum, rank
from vitkit.errors import UsageError

EPS = 1e-8


class KoLeoLoss(nn.Module):
    """−(1/n) Σ_i ln(min_{j≠i} ‖z_i − z_j‖ + 1e-8) for features z scaled to length one: it spreads them over the sphere.

    Call: features `(n d)` → {"loss"}. With fewer than two samples the loss is 0. Everything is computed in fp32, also under autocast.

    Ranks: neighbours are found among the samples of all ranks, whose numbers may differ. In DINOv2's code each device looks among its own.
    Raises `UsageError` for features of another shape.

    Source: Sablayrolles et al., arXiv 1806.03198; the estimator of Kozachenko and Leonenko. Equal to lightly's `KoLeoLoss`.
    """

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"features": torch.randn(samples, 8)}

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        if features.ndim != 2:
            raise UsageError(f"features are {tuple(features.shape)}; expected (samples, dimensions)")
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=1, eps=EPS)
            others = all_gather(z)
            if len(others) < 2:
                return {"loss": 0.0 * z.sum()}
            number = torch.arange(len(z), device=z.device) + (rank() << 32)  # different on every rank
            itself = number[:, None] == all_gather(number)
            nearest = (z @ others.T).detach().masked_fill(itself, -2.0).argmax(dim=1)
            distance = F.pairwise_distance(z, others[nearest], eps=EPS)
            return {"loss": -all_reduce_sum((distance + EPS).log().sum()) / len(others)}
