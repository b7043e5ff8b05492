"""A contrastive loss and the classification of each half."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import losses
from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError
from vitkit.validation import at_least, in_range


class PairMultiTask(nn.Module):
    """L_contrastive + `weight`·L_classes: the registered loss `contrastive`, and the mean cross entropy of both halves.

    Call: image and text embeddings `(n d)`, labels `(n,)`, logits of halves `(n 2 k)` and classes of halves `(n 2)` → the
    parts of the contrastive loss and "classification" in nats. `label_smoothing` is that of the classification. `arguments`
    are the arguments of the contrastive loss. With `weight` = 0, "loss" is the contrastive loss.

    Ranks: both losses are those of the samples of all ranks. Raises `UsageError` if the weight is negative, the smoothing
    is outside [0, 1), or the shapes of logits and classes do not fit.
    """

    vitkit_architecture: ClassVar = {"contrastive": r"([\w.-]+:)?[\w.-]+", "arguments": {r"[a-z_]+": float | bool | None}}

    def __init__(
        self,
        contrastive: str = "info_nce",
        weight: float = 1.0,
        label_smoothing: float = 0.0,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        at_least(0, weight=weight)
        in_range(0, 1, high_included=False, label_smoothing=label_smoothing)
        self.weight, self.label_smoothing = weight, label_smoothing
        self.contrastive = losses.build(contrastive, **(arguments or {}))

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        image, text = torch.randn(2, samples, 8).unbind()
        logits, classes = torch.randn(samples, 2, 3), torch.randint(0, 3, (samples, 2))
        labels = torch.arange(samples) % 5
        return {}, {"image": image, "text": text, "labels": labels, "logits": logits, "classes": classes}

    def uninformed(self, batch_size: int, num_classes: int | None = None) -> dict[str, float]:
        """The values of the contrastive loss, and ln K for K = `num_classes`; "classification" and "loss" are left out if
        it is None."""
        stated = getattr(self.contrastive, "uninformed", None)
        parts: dict[str, float] = {} if stated is None else dict(stated(batch_size))
        contrastive = parts.pop("loss", None)
        if num_classes is not None:
            parts["classification"] = math.log(num_classes)
            if contrastive is not None:
                parts["loss"] = contrastive + self.weight * parts["classification"]
        return parts

    def forward(
        self, image: Tensor, text: Tensor, labels: Tensor | None, logits: Tensor, classes: Tensor
    ) -> dict[str, Tensor]:
        if logits.ndim != 3 or logits.shape[:2] != (len(image), 2) or classes.shape != logits.shape[:2]:
            raise UsageError(
                f"logits are {tuple(logits.shape)} and classes {tuple(classes.shape)} of {len(image)} pairs; expected "
                f"({len(image)}, 2, k) and ({len(image)}, 2)"
            )
        parts = dict(self.contrastive(image, text, labels=labels))
        with torch.autocast(image.device.type, enabled=False):
            total = F.cross_entropy(
                logits.float().flatten(0, 1), classes.flatten(), label_smoothing=self.label_smoothing, reduction="sum"
            )
            count = all_reduce_sum(torch.tensor(float(classes.numel()), device=total.device))
            parts["classification"] = all_reduce_sum(total) / count.clamp(min=1)
        parts["loss"] = parts["loss"] + self.weight * parts["classification"]
        return parts
