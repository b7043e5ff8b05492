"""Anchors with a positive and a negative each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vitkit.augment import Transform
from vitkit.batches import HIDDEN, ImageSplit, Preparation, mix
from vitkit.distributed import world_size
from vitkit.errors import UsageError

Positives = Literal["class", "augmented"]


@dataclass(frozen=True)
class TripletBatches:
    """A split in shuffled batches of `images`, `positives` and `negatives`, each `(b c h w)`, with the anchors' `labels`.

    Each image is an anchor once an epoch. Its positive is another image of its class, or itself where it has no other, and
    with `positives` "augmented" always itself, augmented anew; its negative is drawn evenly from all other classes. All is
    drawn from (seed, epoch, index, rank). A step takes three forward passes where mining among the images of a batch takes
    one. The rest of an epoch that does not fill a batch is left out.

    Raises `UsageError` for a `batch_size` below 1, an unknown kind of positives, hidden labels and a single class.
    """

    split: ImageSplit
    batch_size: int
    augment: Transform | None = None
    positives: Positives = "class"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; expected at least 1")
        if self.positives not in get_args(Positives):
            raise UsageError(f"positives are {self.positives!r}, expected one of {', '.join(map(repr, get_args(Positives)))}")
        labels = self.split.labels
        if len(labels) == 0 or int(labels.min()) == HIDDEN or int(labels.min()) == int(labels.max()):
            raise UsageError("triplets need the labels of all images, of two classes at least; mine in the batch instead")

    @property
    def prepare(self) -> Preparation:
        """How the images are prepared: what a model that is trained on them must be given."""
        return self.split.prepare

    def __len__(self) -> int:
        return self._count(world_size())

    def _count(self, world: int) -> int:
        return len(self.split) // (self.batch_size * world)

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch from index `start` on, on `device`."""
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(mix(seed, number)))
        size = self.batch_size * world
        for index in range(start, self._count(world)):
            anchors = order[index * size : (index + 1) * size].tensor_split(world)[rank]
            key = mix(seed, number, index, rank)
            positives, negatives = self._draw(anchors, torch.Generator().manual_seed(key))
            made = [
                next(self.split.subset(one).batches(len(one), augment=self.augment).epoch(role, seed=key, device=device))
                for role, one in enumerate((anchors, positives, negatives))
            ]
            images = dict(zip(("images", "positives", "negatives"), (batch["images"] for batch in made), strict=True))
            yield {**images, "labels": made[0]["labels"]}

    def _draw(self, anchors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The indices of a positive and of a negative for each anchor's."""
        labels = self.split.labels
        by_class = labels.argsort(stable=True)
        counts = labels.bincount()
        own, total = labels[anchors], len(labels)
        count, first = counts[own], (counts.cumsum(0) - counts)[own]
        place = by_class.argsort()[anchors] - first  # within the class
        # In the circle of a class, and of what lies beyond it, all but the anchor's own are so many steps away.
        step, jump = torch.rand(2, len(anchors), generator=generator, dtype=torch.float64)
        step = 1 + (step * (count - 1)).long()
        negatives = by_class[(first + count + (jump * (total - count)).long()) % total]
        if self.positives == "augmented":
            return anchors, negatives
        return by_class[first + (place + step) % count], negatives
