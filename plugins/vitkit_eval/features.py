"""Frozen features of a dataset's images, and how predictions on them are counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.checkpoint import encode_image
from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError


@dataclass(frozen=True)
class Features:
    """Features float32 `(n d)` of one split, and its labels int64 `(n,)`."""

    features: Tensor
    labels: Tensor


@contextmanager
def evaluating(model: Any) -> Iterator[torch.device]:
    """The model in evaluation mode without gradients, and its device; mode and random state come back afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    parameter = next(model.parameters(), None) if modules else None
    state = torch.get_rng_state()
    try:
        for module in training:
            module.training = False
        with torch.inference_mode():
            yield parameter.device if parameter is not None else torch.device("cpu")
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(state)


def extract_features(model: Any, split: Any, *, batch_size: int = 500) -> Features:
    """The pooled features of every image of a split, once each, in the split's order, on every rank.

    The model's own `encode_image(images) -> (b d)` is asked, or else the mean over its tokens `(b n d)` is taken.
    Called under autocast the features are computed in its precision and returned in float32. Raises `UsageError` for an
    empty split and for features that are not finite.
    """
    if len(split) == 0:
        raise UsageError("the split to evaluate on holds no images")
    found, labels = [], []
    with evaluating(model) as device:
        for batch in split.batches(batch_size).epoch(0, device=device, rank=rank(), world=world_size()):
            # Ranks hold consecutive parts of each batch, so gathering batch by batch keeps the split's order.
            found.append(all_gather(encode_image(model, batch["images"]).float()))
            labels.append(all_gather(batch["labels"]))
    features, targets = torch.cat(found), torch.cat(labels)
    if not bool(features.isfinite().all()):
        raise UsageError("the model's features are not finite: it has diverged, or its weights are damaged")
    return Features(features.clone(), targets.clone())  # clones are no inference tensors: a probe may train on them


def confusion_matrix(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts `(k k)`: row the true class, column the predicted one."""
    return torch.bincount(true * classes + predicted, minlength=classes * classes).view(classes, classes)


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """The share of samples whose label is among the `k` highest of scores `(n c)`."""
    k = min(k, scores.shape[1])
    return float((scores.topk(k, dim=1).indices == labels[:, None]).any(dim=1).float().mean())

