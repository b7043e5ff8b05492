"""The rule for equal scores: they are in random order, and a metric is its expected value over these orders.

Therefore a model that gives every candidate the same score gets exactly the score of guessing, for any order of the candidates.
A candidate whose score is NaN is the last one; another candidate whose score is NaN counts as higher.
"""

import torch
from torch import Tensor


def places(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers int64 `(n,)` of scores `(n c)` that are higher than each row's `target` `(n,)`, and of equal ones.

    `target` is one of its row's scores, and counts among the equal ones.
    """
    higher = (~(scores <= target[:, None])).sum(dim=1).clamp(max=scores.shape[1] - 1)
    at_least = (~(scores < target[:, None])).sum(dim=1)
    return higher, (at_least - higher).clamp(min=1)


def share_in_top(higher: Tensor, equal: Tensor, k: int) -> Tensor:
    """The probability that a candidate is among the first `k`: (k − higher)/equal in [0, 1], float64 `(n,)` on the CPU."""
    return ((k - higher).cpu().double() / equal.cpu()).clamp(0, 1)  # not every accelerator computes in fp64


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """The share of samples whose label is among the `k` highest of scores `(n c)`; equal scores share their places.

    A label whose score is −inf is not a hit, even if fewer than `k` classes have a finite score.
    """
    target = scores.gather(1, labels[:, None])[:, 0]
    hits = share_in_top(*places(scores, target), k)
    return float((hits * (target != -torch.inf).cpu()).mean())


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest of scores `(n c)` and their columns, each `(n k)`, best first; among equal scores the lower columns."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if values.shape[1] > k:
        # topk takes any of the equal ones. This matters if equal ones are on both sides of the k-th place.
        tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        rows, level = scores[tied], values[tied, k - 1 : k]
        equal, room = rows == level, k - (rows > level).sum(dim=1, keepdim=True)
        rows[equal & (equal.cumsum(dim=1, dtype=torch.int32) > room)] = -torch.inf
        columns[tied, :k] = rows.topk(k, dim=1).indices
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


__all__ = ["highest", "places", "share_in_top", "topk_accuracy"]
