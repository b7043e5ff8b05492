"""NT-Xent, the loss of SimCLR: a view finds the other views of its image among all views of the batch."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.distributed import all_gather, all_reduce_sum, rank
from vitkit.errors import UsageError
from vitkit.validation import at_least, positive


class NTXent(nn.Module):
    """The cross entropy of finding the other views of an image by cosine among the views of all images, in nats.

        L = −mean over views i and their positives p of ln( exp(s_ip/T) / Σ_{j≠i} exp(s_ij/T) ),

    s are cosines and T is `temperature`. The positives of a view are the other views of its image; its negatives are all views of
    all other images.

    Call: projections `(v n d)` of v ≥ 2 views of n samples → {"loss", "positive_top1"}: the share of views whose nearest view is of the
    same image. `uninformed` is ln(v·n − 1), where all cosines are equal. Everything is computed in fp32, also under autocast.

    Ranks: views of all ranks are compared; the numbers of samples may differ. The gradient follows `vitkit.distributed.collectives`.
    Raises `UsageError` for a temperature that is not positive, and projections of another shape.

    Source: Chen et al., SimCLR, arXiv 2002.05709. With two views it equals lightly's `NTXentLoss` with `gather_distributed`.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.temperature = temperature

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"projections": torch.randn(2, samples, 8)}

    def uninformed(self, batch_size: int, views: int = 2) -> dict[str, float]:
        """ln(v·n − 1) for n samples of v views: all cosines are equal."""
        at_least(2, views=views)
        return {"loss": math.log(max(views * batch_size - 1, 1))}

    def forward(self, projections: Tensor) -> dict[str, Tensor]:
        if projections.ndim != 3 or len(projections) < 2:
            raise UsageError(f"projections are {tuple(projections.shape)}; expected (views, samples, dim) with two views or more")
        views, samples = projections.shape[:2]
        with torch.autocast(projections.device.type, enabled=False):
            z = F.normalize(projections.float().transpose(0, 1), dim=-1)  # (n v d)
            image = torch.arange(samples, device=z.device) + (rank() << 32)  # different on every rank
            every, images = all_gather(z).flatten(0, 1), all_gather(image)
            same = (image[:, None] == images).repeat_interleave(views, 0).repeat_interleave(views, 1)  # (n·v N·v)
            place = torch.arange(views, device=z.device)
            itself = same & (place.repeat(samples)[:, None] == place.repeat(len(images)))
            cosines = (z.flatten(0, 1) @ every.T).masked_fill(itself, -math.inf)
            log_p = (cosines / self.temperature).log_softmax(dim=1)
            others = same & ~itself
            total = -log_p.masked_fill(~others, 0.0).sum() / (views - 1)
            found = others.gather(1, cosines.detach().argmax(dim=1, keepdim=True)).sum() if len(cosines) else total.new_zeros(())
            sums = all_reduce_sum(torch.stack([total, found.to(total.dtype)])) / max(len(every), 1)
            return {"loss": sums[0], "positive_top1": sums[1].detach()}
