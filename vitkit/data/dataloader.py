"""Batches of images: read, cropped or resized, augmented and normalised as whole tensors on the device.

torch's DataLoader collates samples that worker processes prepare one at a time. Here the images of a batch are rows of one memory-mapped
tensor, so that a batch is one `index_select`, and the same (seed, epoch, index, rank) gives the same batch wherever a run resumes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from vitkit.data.preprocess import Preprocessing
from vitkit.distributed.collectives import world_size
from vitkit.errors import UsageError
from vitkit.seeding import derive_seed
from vitkit.transforms.augment import Transform, cropped_views
from vitkit.transforms.mixup import Mixing
from vitkit.validation import at_least


@dataclass(frozen=True)
class View:
    """`count` views of each image, `size` pixels a side (default: the dataset's), each changed by `transform`.

    Crops and flips that `transform` begins with are sampled from the stored image, in one step with the resizing.
    """

    size: int | None = None
    count: int = 1
    transform: Transform | None = None

    def __post_init__(self) -> None:
        at_least(1, size=self.size, count=self.count)


class SplitReader(Protocol):
    """The parts of a split that batches are made from: `vitkit.data.split.ImageSplit`."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def skipped(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def read(self, shares: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]: ...

    def order(self, generator: Generator, size: int) -> Tensor: ...


@dataclass(frozen=True)
class ImageBatches:
    """A split, cut into batches of `batch_size` a rank: `contracts.Batches`.

    The order of an epoch comes from (seed, epoch), the augmentation and mixing of a batch from (seed, epoch, index, rank), so an epoch
    can be entered at any batch. W ranks share each run of W · `batch_size` images.

    The images that are left at the end of an epoch make a smaller last batch, unless `drop_last`. With `shuffle` it is shared equally:
    up to W − 1 images, different ones in each epoch, are left out, and the mean over the ranks' means is the mean over the batch. Without
    `shuffle` every image comes exactly once, and the ranks' last batches differ by up to one image, so that one may be empty. Raises
    `UsageError` for a `batch_size` or `views` below 1, and for `augment` or `mix` beside a sequence of `View`s.
    """

    split: SplitReader
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    augment: Transform | None = None
    views: int | tuple[View, ...] = 1
    mix: Mixing | None = None

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)
        if isinstance(self.views, int):
            at_least(1, views=self.views)
        elif not self.views:
            raise UsageError("views is empty; expected a number, or at least one View")
        elif self.augment is not None or self.mix is not None:
            given = "augment" if self.augment is not None else "mix"
            raise UsageError(f"{given} is given with several Views; give each View its transform, and mix in the model")

    def __len__(self) -> int:
        """Batches in an epoch, the same number on every rank."""
        return self._count(world_size())

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the images; a model that is trained on them needs the same."""
        return self.split.preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, empty for a split that belongs to no dataset."""
        return self.split.classes

    @property
    def skipped(self) -> list[str]:
        """A line for each image that could not be read so far and was left out of its batch."""
        return self.split.skipped

    def _count(self, world: int) -> int:
        full, rest = divmod(len(self.split), self.batch_size * world)
        return full + (not self.drop_last and rest >= (world if self.shuffle else 1))

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Any]]:
        """The batches of one epoch from index `start` on, on `device`."""
        size, indices = self.batch_size * world, range(start, self._count(world))
        order = self._order(derive_seed(seed, number), size, world)
        shares = (order[index * size : (index + 1) * size].tensor_split(world)[rank] for index in indices)
        # Sorted indices read a memory-mapped file in one direction; the order within a shuffled batch has no meaning.
        shares = (share.sort().values if self.shuffle else share for share in shares)
        for index, (images, rows) in zip(indices, self.split.read(shares), strict=True):
            yield self._make(images, self.split.labels[rows], derive_seed(seed, number, index, rank), torch.device(device))

    def _order(self, seed: int, size: int, world: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.split))
        return self.split.order(Generator().manual_seed(seed), size)[: len(self.split) // world * world]

    def _make(self, images: Tensor, labels: Tensor, seed: int, device: torch.device) -> dict[str, Any]:
        images, labels = _moved(images, device), _moved(labels, device)
        generator = Generator(images.device).manual_seed(seed)
        if not isinstance(self.views, int):
            views = tuple(self.preprocessing.normalise(self._view(images, view, generator)) for view in self.views)
            return {"views": views, "images": views[0], "labels": labels}
        images = self._view(images, View(count=self.views, transform=self.augment), generator)
        images = images.squeeze(1) if self.views == 1 else images
        batch = {"labels": labels}
        if self.mix is not None:
            images, partners, weights = self.mix(images, labels, generator)
            batch |= {"partners": labels[partners], "weights": weights}
        return {"images": self.preprocessing.normalise(images), **batch}

    def _view(self, images: Tensor, view: View, generator: Generator) -> Tensor:
        """uint8 `(b c h w)` → float32 `(b v c s s)` in [0, 1]."""
        preprocessing, transform = self.preprocessing, view.transform
        if view.size is not None:
            preprocessing = replace(preprocessing, shape=(preprocessing.shape[0], view.size, view.size))
        size, shape = preprocessing.shape[1:], (len(images), view.count)
        if transform is not None and preprocessing.fit == "resize" and tuple(images.shape[2:]) != size:
            cropped = cropped_views(transform, images, view.count, size, generator)
            if cropped is not None:
                return cropped.unflatten(0, shape)
        images = preprocessing.pixels(images)
        if view.count > 1:
            images = images.repeat_interleave(view.count, dim=0)
        return (images if transform is None else transform(images, generator)).unflatten(0, shape)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device; a copy from pinned memory does not wait for the computation on the GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


__all__ = ["ImageBatches", "View"]
