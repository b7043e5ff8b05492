"""Anchors with a positive and a negative each."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vitkit.contracts import UNLABELLED
from vitkit.data import ImageSplit, Preprocessing
from vitkit.distributed import world_size
from vitkit.errors import UsageError
from vitkit.seeding import derive_seed
from vitkit.transforms import Transform

Positives = Literal["class", "augmented"]


@dataclass(frozen=True)
class TripletBatches:
    """A split in shuffled batches of `images`, `positives` and `negatives`, each `(b c h w)`, with the anchors' `labels`.

    Each image is an anchor once an epoch. Its positive is another image of its class, or itself where it has no other, and
    with `positives` "augmented" always itself, augmented anew; its negative is drawn evenly from all other classes. All is
    drawn from (seed, epoch, index, rank). A step takes three forward passes where mining among the images of a batch takes
    one. The rest of an epoch that does not fill a batch is left out.

    Of lazily read images (`contracts.LazyImages`) anchors come in the order that suits what they lie in, the others from
    anywhere, which takes long where that is far away; mining in the batch does not. A triplet with an image that cannot be
    read is left out, and the image named in `skipped`.

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
        if len(labels) == 0 or int(labels.min()) == UNLABELLED or int(labels.min()) == int(labels.max()):
            raise UsageError("triplets need the labels of all images, of two classes at least; mine in the batch instead")

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images are prepared: what a model that is trained on them must be given."""
        return self.split.preprocessing

    @property
    def skipped(self) -> list[str]:
        """A line for each image that could not be read so far."""
        return self.split.skipped

    def __len__(self) -> int:
        return self._count(world_size())

    def _count(self, world: int) -> int:
        return len(self.split) // (self.batch_size * world)

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch from index `start` on, on `device`."""
        drawn = self._drawn(derive_seed(seed, number), rank, world)
        keys = [derive_seed(seed, number, index, rank) for index in range(start, self._count(world))]
        triplets, ahead = tee(self._triplets(anchors, key) for anchors, key in zip(drawn[start:], keys, strict=True))
        # Each image once, and sorted: a memory-mapped file is read in one direction.
        read = self.split.read(triplet.unique() for triplet in ahead)
        for triplet, key, (images, rows) in zip(triplets, keys, read, strict=True):
            yield self._make(triplet, images, rows, key, torch.device(device))

    def _drawn(self, seed: int, rank: int, world: int) -> list[Tensor]:
        """This rank's anchors of every batch of an epoch."""
        size = self.batch_size * world
        order = self.split.order(torch.Generator().manual_seed(seed), size)
        return [part.tensor_split(world)[rank] for part in order.split(size)[: self._count(world)]]

    def _make(self, triplet: Tensor, images: Tensor, rows: Tensor, seed: int, device: torch.device) -> dict[str, Tensor]:
        """A batch of the triplets `(3 b)` of whose images all are among `rows`, which are sorted."""
        triplet = triplet[:, torch.isin(triplet, rows).all(0)]
        preprocessing, generator = self.split.preprocessing, torch.Generator(device).manual_seed(seed)
        made = {}
        for role, one in zip(("images", "positives", "negatives"), triplet, strict=True):
            pixels = preprocessing.pixels(images.index_select(0, torch.searchsorted(rows, one)).to(device))
            made[role] = preprocessing.normalise(pixels if self.augment is None else self.augment(pixels, generator))
        return {**made, "labels": self.split.labels[triplet[0]].to(device)}

    def _triplets(self, anchors: Tensor, seed: int) -> Tensor:
        """The indices `(3 b)` of anchors, of a positive and of a negative for each."""
        labels = self.split.labels
        by_class = labels.argsort(stable=True)
        counts = labels.bincount()
        own, total = labels[anchors], len(labels)
        count, first = counts[own], (counts.cumsum(0) - counts)[own]
        place = by_class.argsort()[anchors] - first  # within the class
        # In the circle of a class, and of what lies beyond it, all but the anchor's own are so many steps away.
        generator = torch.Generator().manual_seed(seed)
        step, jump = torch.rand(2, len(anchors), generator=generator, dtype=torch.float64)
        step = 1 + (step * (count - 1)).long()
        negatives = by_class[(first + count + (jump * (total - count)).long()) % total]
        positives = anchors if self.positives == "augmented" else by_class[first + (place + step) % count]
        return torch.stack([anchors, positives, negatives])
