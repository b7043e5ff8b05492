"""The loss of masked autoencoders."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError
from vitkit.validation import positive


class MaskedReconstruction(nn.Module):
    """The mean squared error between predicted and true pixels of masked patches.

        L = mean over patches and pixels of (x̂ − y)²,   y = (x − mean(x)) / √(var(x) + eps)   with `normalise`, else y = x.

    Mean and unbiased variance are those of the patch, so that every patch counts equally whatever its brightness and contrast.

    Call: predictions `(n m p)` and true pixels `(n m p)` of m masked patches with p values → {"loss"}. The loss is computed in fp32,
    also under autocast.

    `uninformed`: a prediction of zero costs (p − 1)/p for a normalised patch; without `pixels` it is given as 1. It costs about 1
    without `normalise` too, if images are normalised by the mean and standard deviation of the dataset.

    Ranks: the loss is the mean over the patches of all ranks, whose numbers may differ. Raises `UsageError` for shapes that differ,
    patches of one value with `normalise`, and an `eps` that is not positive.

    Source: He et al., arXiv 2111.06377; its code and lightly's `normalize_mean_var` have the same variance and eps.
    """

    def __init__(self, normalise: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        positive(eps=eps)
        self.normalise, self.eps = normalise, eps

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"prediction": torch.randn(samples, 3, 12), "target": torch.randn(samples, 3, 12)}

    def uninformed(self, batch_size: int, pixels: int | None = None) -> dict[str, float]:
        """The value for a prediction of zero, for patches of `pixels` values."""
        return {"loss": 1.0 if pixels is None or not self.normalise else (pixels - 1) / pixels}

    def forward(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        if prediction.shape != target.shape or prediction.ndim != 3 or (self.normalise and target.shape[2] < 2):
            least = " with two values a patch or more" if self.normalise else ""
            raise UsageError(
                f"predictions are {tuple(prediction.shape)} and pixels {tuple(target.shape)}; expected two of (samples, patches, "
                f"values){least}"
            )
        with torch.autocast(prediction.device.type, enabled=False):
            truth = self.normalised(target) if self.normalise else target.float()
            total = all_reduce_sum((prediction.float() - truth).square().sum())
            count = all_reduce_sum(torch.tensor(float(truth.numel()), device=truth.device))
            return {"loss": total / count.clamp(min=1)}

    def normalised(self, target: Tensor) -> Tensor:
        """Each patch `(... p)` with mean 0 and variance 1, in fp32."""
        centred = target.float() - target.float().mean(dim=-1, keepdim=True)
        variance = centred.square().sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)  # var() warns about an empty batch
        return centred / (variance + self.eps).sqrt()
