"""Batches of triplets: anchors, each with a positive and a negative."""

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
from vitkit.validation import at_least, one_of

Positives = Literal["class", "augmented"]


@dataclass(frozen=True)
class TripletBatches:
    """A split in shuffled batches of `images`, `positives` and `negatives`, each `(b c h w)`, with the anchors' `labels`.

    Each image is an anchor once an epoch. Its positive is another image of its class, or itself if there is no other; with
    `positives` "augmented" it is the anchor with another augmentation. Its negative is drawn evenly from all images of
    other classes. Everything is drawn from (seed, epoch, index, rank). A step takes three forward passes; mining in the
    batch takes one. Images at the end of an epoch that do not fill a batch are left out.

    Lazily read images (`contracts.LazyImages`) are anchors in the order of their storage. Their positives and negatives are
    at any position, which can be slow to read. Mining in the batch avoids this. A triplet with an image that cannot be read
    is left out, and `skipped` names the image.

    Raises `UsageError` if `batch_size` is below 1, the kind of positives is unknown, an image has no label, or there is
    only one class.
    """

    split: ImageSplit
    batch_size: int
    augment: Transform | None = None
    positives: Positives = "class"

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)
        one_of(get_args(Positives), positives=self.positives)
        labels = self.split.labels
        if len(labels) == 0 or int(labels.min()) == UNLABELLED or int(labels.min()) == int(labels.max()):
            raise UsageError("triplets need the labels of all images, of two classes at least; mine in the batch instead")

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of a model that is trained on these images."""
        return self.split.preprocessing

    @property
    def skipped(self) -> list[str]:
        """One line per image that could not be read so far."""
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
        """A batch of the triplets `(3 b)` whose three images are among the sorted `rows`."""
        triplet = triplet[:, torch.isin(triplet, rows).all(0)]
        preprocessing, generator = self.split.preprocessing, torch.Generator(device).manual_seed(seed)
        batch = {}
        for role, one in zip(("images", "positives", "negatives"), triplet, strict=True):
            pixels = preprocessing.pixels(images.index_select(0, torch.searchsorted(rows, one)).to(device))
            batch[role] = preprocessing.normalise(pixels if self.augment is None else self.augment(pixels, generator))
        return {**batch, "labels": self.split.labels[triplet[0]].to(device)}

    def _triplets(self, anchors: Tensor, seed: int) -> Tensor:
        """The indices `(3 b)` of anchors, of a positive and of a negative for each."""
        labels = self.split.labels
        by_class = labels.argsort(stable=True)
        counts = labels.bincount()
        anchor_labels, total = labels[anchors], len(labels)
        count, first = counts[anchor_labels], (counts.cumsum(0) - counts)[anchor_labels]
        place = by_class.argsort()[anchors] - first  # within the class
        # Classes are adjacent in `by_class`, so that a step within the class, or past its end, never returns to the anchor.
        generator = torch.Generator().manual_seed(seed)
        step, jump = torch.rand(2, len(anchors), generator=generator, dtype=torch.float64)
        step = 1 + (step * (count - 1)).long()
        negatives = by_class[(first + count + (jump * (total - count)).long()) % total]
        positives = anchors if self.positives == "augmented" else by_class[first + (place + step) % count]
        return torch.stack([anchors, positives, negatives])
