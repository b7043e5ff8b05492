"""Losses over more samples than a device holds at once, with the gradient of one batch.

Embeddings are computed part by part, keeping nothing but them; the loss sees all of them; on the way back each part is
embedded again, with the random state that it had, and passes its embeddings' gradient on to the parameters. So memory is one
part's and that of all embeddings, time is a forward pass more, and dropout drops the same. A batch norm belongs into
`loss_of`, for in `embed` it would see each part alone.

Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from vitkit.errors import UsageError


@runtime_checkable
class Embedding(Protocol):
    """A model whose loss compares samples with each other, cut where it does.

    `embed(batch)` gives tensors `(b ...)` by name, to which each sample contributes by itself; `loss_of` their loss and its
    parts; `model(batch)` is `loss_of(embed(batch))`.
    """

    def embed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def loss_of(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]: ...


class GradCache(nn.Module):
    """An `Embedding` with batches of any size in the memory of `chunk` samples: the same loss and the same gradient.

    Ranks: as the model's. Raises `UsageError` for a chunk below one sample and a model that is no `Embedding`.
    """

    def __init__(self, model: Any, chunk: int) -> None:
        super().__init__()
        if chunk < 1:
            raise UsageError(f"chunk is {chunk}; expected at least 1 sample")
        if not isinstance(model, Embedding):
            raise UsageError(f"{type(model).__name__} has no embed and loss_of: a gradient cache needs both")
        self.model: Any = model
        self.chunk = chunk

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.loss_of(self.embed(batch))

    def embed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model embeds, chunk by chunk."""
        parts = zip(*(values.split(self.chunk) for values in batch.values()), strict=True)
        chunks = [dict(zip(batch, part, strict=True)) for part in parts]
        return _together([recompute(self.model.embed, chunk, use_reentrant=False) for chunk in chunks])

    def loss_of(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model makes of it."""
        return dict(self.model.loss_of(embedded))


class Accumulated(nn.Module):
    """An `Embedding` called with several batches, and a seed for each: the loss and the gradient of them as one batch.

    Ranks: as the model's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches: Sequence[dict[str, Tensor]], seeds: Sequence[int]) -> dict[str, Tensor]:
        found = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            alone = len(batches) == 1
            found.append(self.model.embed(batch) if alone else recompute(self.model.embed, batch, use_reentrant=False))
        return dict(self.model.loss_of(_together(found)))


def _together(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


__all__ = ["Accumulated", "Embedding", "GradCache"]
