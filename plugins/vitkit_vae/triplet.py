"""The triplet loss and the mining of its triplets."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.contracts import UNLABELLED
from vitkit.distributed import all_gather, all_reduce_sum, rank
from vitkit.errors import UsageError
from vitkit.validation import at_least, one_of

Mining = Literal["random", "batch_hard", "semi_hard", "given"]
_LEAST_SQUARE = 1e-12  # of a distance, whose root has no gradient at zero


class TripletLoss(nn.Module):
    """Mean over triplets of max(0, d(a, p) − d(a, n) + margin): an anchor a, a sample p of its class, a sample n of another class.

    d is the Euclidean distance of embeddings that are scaled to length 1, in [0, 2]. If `normalize` is false, embeddings
    are not scaled. Call with embeddings `(b e)` and labels int64 `(b,)`, where a sample with label −1 is in no triplet; or
    with `positives` and `negatives` `(b e)`, one of each per anchor. → {"loss", "active"}: "active" is the share of
    triplets with a loss above zero. `mining` chooses the triplets of a batch:

    - "random": for each anchor one positive and one negative, drawn with equal probability from torch's global generator.
    - "batch_hard": for each anchor its farthest positive and nearest negative (Hermans et al., arXiv 1703.07737). It may
      pull all embeddings into one point from the first step on. The loss is then the margin.
    - "semi_hard": for each anchor and positive the nearest negative that is farther than the positive, if it is within
      the margin (Schroff et al., FaceNet, arXiv 1503.03832, whose distance is the squared one).
    - "given": only the triplets of `positives` and `negatives`, which must be given.

    A batch without a triplet (one class, no class with two members, or no semi-hard negative) has loss 0 and active 0, with
    gradient 0. Computed in fp32.

    Ranks: each rank mines positives and negatives for its anchors among the samples of all ranks. The loss is the mean over
    the whole batch and equal on every rank. Raises `UsageError` if the mining is unknown, the margin is below 0, or shapes
    do not fit.
    """

    def __init__(self, margin: float = 0.2, mining: Mining = "semi_hard", normalize: bool = True) -> None:
        super().__init__()
        one_of(get_args(Mining), mining=mining)
        at_least(0, margin=margin)
        self.margin, self.mining, self.normalize = margin, mining, normalize

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"embeddings": torch.randn(samples, 8), "labels": torch.arange(samples) % 3}

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The limit for embeddings that differ only by a little noise: all distances are equal, and the loss is the margin."""
        return {"loss": self.margin}

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        positives: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> dict[str, Tensor]:
        with torch.autocast(embeddings.device.type, enabled=False):
            if positives is not None and negatives is not None:
                shapes = {tuple(given.shape) for given in (embeddings, positives, negatives)}
                if len(shapes) > 1:
                    raise UsageError(f"anchors, positives and negatives are {sorted(shapes)}; expected one shape (batch, dim)")
                a, p, n = (self._scaled(given) for given in (embeddings, positives, negatives))
                return self._mean(_distance(a, p), _distance(a, n), a.new_ones(len(a), dtype=torch.bool))
            if self.mining == "given" or labels is None or labels.shape != embeddings.shape[:1]:
                given = None if labels is None else tuple(labels.shape)
                raise UsageError(
                    f"mining is {self.mining!r}, embeddings are {tuple(embeddings.shape)} and labels {given}; expected (batch, dim) "
                    f"and (batch,), or both positives and negatives, which mining='given' needs"
                )
            return self._mean(*self._mined(self._scaled(embeddings), labels))

    def _scaled(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.float(), dim=1) if self.normalize else embeddings.float()

    def _mean(self, positive: Tensor, negative: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """The mean over triplets with distances `positive` and `negative`, for which `counted` is true."""
        losses = torch.where(counted, F.relu(positive - negative + self.margin), 0.0)
        total = all_reduce_sum(torch.stack([counted.sum().float(), (losses > 0).sum().float()]))
        count, active = total.unbind()
        return {"loss": all_reduce_sum(losses.sum()) / count.clamp(min=1), "active": active / count.clamp(min=1)}

    def _mined(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances to positive and negative, and which of them are triplets, for this rank's anchors."""
        all_embeddings, all_labels = all_gather(embeddings), all_gather(labels)
        if not len(all_embeddings):
            nothing = embeddings.sum(dim=1)
            return nothing, nothing, nothing.bool()
        labelled = (labels != UNLABELLED)[:, None] & (all_labels != UNLABELLED)
        same = labels[:, None] == all_labels
        sizes = all_gather(labels.new_tensor([len(labels)]))
        place = sizes[: rank()].sum() + torch.arange(len(embeddings), device=embeddings.device)
        itself = place[:, None] == torch.arange(len(all_embeddings), device=embeddings.device)
        alike, unlike = labelled & same & ~itself, labelled & ~same  # (b n)
        with torch.no_grad():
            far = _distances(embeddings, all_embeddings)
            if self.mining == "semi_hard":
                rows, positive, negative, counted = _semi_hard(far, alike, unlike, self.margin)
            else:
                score = torch.rand(2, *far.shape, device=far.device) if self.mining == "random" else far.expand(2, -1, -1)
                positive = score[0].masked_fill(~alike, -torch.inf).argmax(dim=1)
                negative = score[1].masked_fill(~unlike, torch.inf).argmin(dim=1)
                rows = torch.arange(len(embeddings), device=embeddings.device)
                counted = alike.any(dim=1) & unlike.any(dim=1)
        anchors = embeddings[rows]
        return _distance(anchors, all_embeddings[positive]), _distance(anchors, all_embeddings[negative]), counted


def _semi_hard(far: Tensor, alike: Tensor, unlike: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each pair of an anchor and a positive: their indices, the negative's, and whether it is semi-hard."""
    rows, positive = alike.nonzero(as_tuple=True)
    negatives, order = far.masked_fill(~unlike, torch.inf).sort(dim=1)
    # In sorted rows the first negative beyond the positive is found by bisection, not in a cube of all triplets.
    first = torch.searchsorted(negatives, far.masked_fill(~alike, 0.0), right=True).clamp(max=far.shape[1] - 1)
    place = first[rows, positive]
    distance = far[rows, positive]
    counted = (negatives[rows, place] > distance) & (negatives[rows, place] < distance + margin)
    return rows, positive, order[rows, place], counted


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """All distances `(b n)`."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp(min=_LEAST_SQUARE).sqrt()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """The distances of the rows `(n,)`."""
    return (x - y).square().sum(1).clamp(min=_LEAST_SQUARE).sqrt()
