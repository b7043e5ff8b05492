"""Cross-entropy with smoothed and mixed labels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.contracts import UNLABELLED
from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError
from vitkit.validation import in_range


class CrossEntropy(nn.Module):
    """Cross-entropy of logits `(b k)` and labels `(b,)`, the mean over the samples with a label: {"loss", "top1"}.

        L = −(1/b)·Σ_i Σ_c t_ic·log softmax(z_i)_c,   t_i = (1 − ε)·(w_i·onehot(y_i) + (1 − w_i)·onehot(p_i)) + ε/k

    `smoothing` is ε in [0, 1). With mixed images `partners` p `(b,)` are the labels of the images mixed in, and `weights` w in [0, 1]
    `(b,)` the shares of the images themselves. `top1` is the share of samples whose largest logit is that of y, or of p where w is
    below ½; it has no gradient. Labels are int64 in [0, k), or `UNLABELLED`, which counts as no sample. The loss is computed in
    fp32 and in nats; without a sample it is 0.

    Ranks: the sums and the number of samples are those of all ranks. Raises `UsageError` for another ε, for shapes that do not fit, and
    for `partners` without `weights`.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        in_range(0, 1, high_included=False, smoothing=smoothing)
        self.smoothing = smoothing

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        labels = torch.arange(samples) % 4
        inputs = {"partners": labels.flip(0), "weights": torch.linspace(0, 1, samples)}
        return {"smoothing": 0.1}, {"logits": torch.randn(samples, 4), "labels": labels, **inputs}

    def forward(
        self, logits: Tensor, labels: Tensor, partners: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise UsageError(f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (b, k) and (b,)")
        if (partners is None) != (weights is None):
            raise UsageError("partners and weights belong together; give both, or none")
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            losses, main = self._each(logits, labels), labels
            if partners is not None and weights is not None:
                losses = weights * losses + (1 - weights) * self._each(logits, partners)
                main = torch.where(weights >= 0.5, labels, partners)
            known = labels != UNLABELLED
            count = all_reduce_sum(known.sum().float()).clamp(min=1)
            hits = ((logits.detach().argmax(dim=1) == main) & known).sum().float()
            return {"loss": all_reduce_sum(losses.sum()) / count, "top1": all_reduce_sum(hits) / count}

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED, label_smoothing=self.smoothing)


__all__ = ["CrossEntropy"]
