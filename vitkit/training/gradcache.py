"""Losses over more samples than a device holds at once, with the gradient of one batch.

Features are computed for one part of the batch at a time, and only the features are kept. The loss takes the features of the full
batch. The backward pass computes the features of each part a second time, from the same random state, so that dropout drops the same
units, and passes their gradient on to the parameters. The memory is that of one part and of all features; the cost is one more
forward pass. Put a batch norm into `compute_loss`, because in `forward_features` it would see only one part.

Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from vitkit.errors import UsageError
from vitkit.training.batches import map_batch, samples_of
from vitkit.validation import at_least


class GradCacheable(nn.Module, ABC):
    """A model whose loss compares samples with each other, in two steps: the features of each sample, and the comparison.

    A model declares this by inheriting from it. `model(batch)` is `compute_loss(forward_features(batch))`.
    """

    @abstractmethod
    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors `(b ...)` by name, in which row i depends on sample i alone."""

    @abstractmethod
    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scalar `"loss"` and its parts, of the features of a whole batch."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.compute_loss(self.forward_features(batch))


class GradCache(GradCacheable):
    """A `GradCacheable` model with batches of any size in the memory of `chunk` samples: the same loss and gradient.

    Ranks: as the model's. Raises `UsageError` for a chunk below one sample and a model that is not `GradCacheable`.
    """

    def __init__(self, model: GradCacheable, chunk: int) -> None:
        super().__init__()
        at_least(1, chunk=chunk)
        if not isinstance(model, GradCacheable):
            raise UsageError(
                f"{type(model).__name__} is not GradCacheable: a gradient cache needs a model that inherits from "
                f"vitkit.training.GradCacheable and defines forward_features and compute_loss"
            )
        self.model = model
        self.chunk = chunk

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's features, computed chunk by chunk."""
        starts = range(0, samples_of(batch), self.chunk)
        chunks = [map_batch(batch, itemgetter(slice(start, start + self.chunk))) for start in starts]
        return _concatenate([recompute(self.model.forward_features, chunk, use_reentrant=False) for chunk in chunks])

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The losses of a prediction that uses no information, as the model gives them; empty if it gives none."""
        stated = getattr(self.model, "uninformed", None)
        return dict(stated(batch_size)) if callable(stated) else {}

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's loss of these features."""
        return dict(self.model.compute_loss(features))


class Accumulated(nn.Module):
    """A `GradCacheable` model that is called with several batches and a seed for each; it computes the loss of all of them as one batch.

    Ranks: as the model's.
    """

    def __init__(self, model: GradCacheable) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches: Sequence[dict[str, Tensor]], seeds: Sequence[int]) -> dict[str, Tensor]:
        features = []
        single = len(batches) == 1
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            compute = self.model.forward_features
            features.append(compute(batch) if single else recompute(compute, batch, use_reentrant=False))
        return dict(self.model.compute_loss(_concatenate(features)))


def _concatenate(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


__all__ = ["Accumulated", "GradCache", "GradCacheable"]
