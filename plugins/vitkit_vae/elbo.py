"""The two parts of a variational autoencoder's loss: the reconstruction and the KL divergence."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError
from vitkit.validation import one_of

Kind = Literal["mse", "bce", "l1"]
Reduction = Literal["pixel", "image"]
LatentReduction = Literal["image", "dimension"]


class ReconstructionLoss(nn.Module):
    """The distance of a decoder's images x̂ = sigmoid(logits) from images x in [0, 1], both `(b c h w)`.

    For each pixel and channel, by `kind`:

        "mse": (x − x̂)²,  "l1": |x − x̂|,  "bce": −x·ln x̂ − (1 − x)·ln(1 − x̂), in nats.

    `reduction` "pixel" is the mean over pixels, channels and images; "image" is the sum over an image's pixels and
    channels, then the mean over images. The BCE of grey pixels does not fall to 0: its lowest value is the entropy of x.
    Call: logits, images → {"loss"}. Computed in fp32.

    Ranks: the mean is over the whole batch and equal on every rank. Raises `UsageError` if the kind or reduction is
    unknown, or shapes differ.
    """

    def __init__(self, kind: Kind = "mse", reduction: Reduction = "pixel") -> None:
        super().__init__()
        one_of(get_args(Kind), kind=kind)
        one_of(get_args(Reduction), reduction=reduction)
        self.kind, self.reduction = kind, reduction

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"logits": torch.randn(samples, 1, 4, 4), "images": torch.rand(samples, 1, 4, 4)}

    def uninformed_pixels(self, mean: Sequence[float], std: Sequence[float], pixels: int) -> float | None:
        """The value for x̂ = `mean` (one number per channel), for images with this mean and standard deviation per channel.

        "mse": mean of std²; "bce": the entropy −m·ln m − (1 − m)·ln(1 − m) of each mean m; "l1": None, since it does not
        follow from these moments. `pixels` counts the pixels of a channel, for the reduction "image".
        """
        if self.kind == "l1":
            return None
        if self.kind == "mse":
            per_channel = [s * s for s in std]
        else:
            per_channel = [-m * math.log(m) - (1 - m) * math.log(1 - m) if 0 < m < 1 else 0.0 for m in mean]
        total = sum(per_channel)
        return total / len(per_channel) if self.reduction == "pixel" else total * pixels

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

    `reduction` "image" sums over the dimensions of the latent, and "dimension" takes their mean. Then follows the mean over
    images. Call: μ, log σ², both `(b z)` → {"loss"}. Computed in fp32.

    Ranks: the mean is over the whole batch and equal on every rank. Raises `UsageError` if the reduction is unknown, or
    shapes differ. Source: Kingma and Welling, arXiv 1312.6114, appendix B.
    """

    def __init__(self, reduction: LatentReduction = "image") -> None:
        super().__init__()
        one_of(get_args(LatentReduction), reduction=reduction)
        self.reduction = reduction

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        mu, log_var = torch.randn(2, samples, 8).unbind()
        return {}, {"mu": mu, "log_var": log_var}

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """A posterior that ignores the image is the prior: 0."""
        return {"loss": 0.0}

    def forward(self, mu: Tensor, log_var: Tensor) -> dict[str, Tensor]:
        if mu.shape != log_var.shape or mu.ndim != 2:
            raise UsageError(
                f"μ is {tuple(mu.shape)} and log σ² {tuple(log_var.shape)}; expected one shape (batch, latent)"
            )
        with torch.autocast(mu.device.type, enabled=False):
            mu, log_var = mu.float(), log_var.float()
            total = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum()
            per_image = _mean_over_batch(total, len(mu))
        return {"loss": per_image / mu.shape[1] if self.reduction == "dimension" else per_image}


def _mean_over_batch(total: Tensor, count: int) -> Tensor:
    """The sums over the ranks' images, divided by the number of all images."""
    return all_reduce_sum(total) / all_reduce_sum(total.new_tensor(float(count))).clamp(min=1)
