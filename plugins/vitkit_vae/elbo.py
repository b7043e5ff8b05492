"""The two halves of a variational autoencoder's loss."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError


class ReconstructionLoss(nn.Module):
    """How far a decoder's images x̂ = sigmoid(logits) are from images x in [0, 1], both `(b c h w)`.

    For each pixel and channel, by `kind`:

        "mse": (x − x̂)²,  "l1": |x − x̂|,  "bce": −x·ln x̂ − (1 − x)·ln(1 − x̂), in nats.

    `reduction` "pixel" takes the mean over pixels, channels and images, "image" the sum over an image's pixels and
    channels, then the mean over images. BCE of grey pixels does not fall to 0: its least value is x's own entropy.
    Call: logits, images → {"loss"}. Computed in fp32.

    Ranks: the mean is over the whole batch, the same on each. Raises `UsageError` for another kind or reduction and for
    shapes that differ.
    """

    def __init__(
        self, kind: Literal["mse", "bce", "l1"] = "mse", reduction: Literal["pixel", "image"] = "pixel"
    ) -> None:
        super().__init__()
        _check("kind", kind, ("mse", "bce", "l1"))
        _check("reduction", reduction, ("pixel", "image"))
        self.kind, self.reduction = kind, reduction

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"logits": torch.randn(samples, 1, 4, 4), "images": torch.rand(samples, 1, 4, 4)}

    def forward(self, logits: Tensor, images: Tensor) -> dict[str, Tensor]:
        if logits.shape != images.shape or logits.ndim != 4:
            raise UsageError(
                f"reconstructions are {tuple(logits.shape)}, images {tuple(images.shape)}; expected one shape (b, c, h, w)"
            )
        with torch.autocast(logits.device.type, enabled=False):
            logits, images = logits.float(), images.float()
            if self.kind == "bce":
                total = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
            elif self.kind == "mse":
                total = F.mse_loss(logits.sigmoid(), images, reduction="sum")
            else:
                total = F.l1_loss(logits.sigmoid(), images, reduction="sum")
            per_image = _mean_over_batch(total, len(logits))
        return {"loss": per_image / logits.shape[1:].numel() if self.reduction == "pixel" else per_image}


class KLLoss(nn.Module):
    """KL(N(μ, diag σ²) ‖ N(0, I)) = −½ Σ_j (1 + log σ_j² − μ_j² − σ_j²), in nats.

    `reduction` "image" is that sum over the latent's dimensions, "dimension" their mean; then the mean over images. Call:
    μ, log σ², both `(b z)` → {"loss"}. Computed in fp32.

    Ranks: the mean is over the whole batch, the same on each. Raises `UsageError` for another reduction and for shapes that
    differ. Source: Kingma and Welling, arXiv 1312.6114, appendix B.
    """

    def __init__(self, reduction: Literal["image", "dimension"] = "image") -> None:
        super().__init__()
        _check("reduction", reduction, ("image", "dimension"))
        self.reduction = reduction

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        mu, log_var = torch.randn(2, samples, 8).unbind()
        return {}, {"mu": mu, "log_var": log_var}

    def forward(self, mu: Tensor, log_var: Tensor) -> dict[str, Tensor]:
        if mu.shape != log_var.shape or mu.ndim != 2:
            raise UsageError(
                f"μ is {tuple(mu.shape)} and log σ² {tuple(log_var.shape)}, expected one shape (batch, latent)"
            )
        with torch.autocast(mu.device.type, enabled=False):
            mu, log_var = mu.float(), log_var.float()
            total = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum()
            per_image = _mean_over_batch(total, len(mu))
        return {"loss": per_image / mu.shape[1] if self.reduction == "dimension" else per_image}


def _mean_over_batch(total: Tensor, count: int) -> Tensor:
    """Sums over the ranks' images, divided by the number of all."""
    return all_reduce_sum(total) / all_reduce_sum(total.new_tensor(float(count))).clamp(min=1)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
