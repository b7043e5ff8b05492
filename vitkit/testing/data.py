"""Checks of datasets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitkit.contracts import UNLABELLED, Batches, Dataset
from vitkit.errors import ConformanceError
from vitkit.testing.cases import Case

BATCH_SIZE = 4
SPLITS = ("train", "val", "test")


def check_dataset_fields(case: Case) -> str:
    """Name, classes, shape, mean, std, source, licence and three splits, each of the type that the contract asks for."""
    dataset = case.build()
    missing = [name for name in Dataset.__annotations__ if not hasattr(dataset, name)]
    if missing:
        raise ConformanceError(f"{case} has no {', '.join(missing)}; vitkit.data.from_store builds a complete dataset from tensors")
    if not isinstance(dataset.classes, list) or not all(isinstance(name, str) for name in dataset.classes):
        raise ConformanceError(f"{case}: classes are {dataset.classes!r:.80}; expected a list of names")
    if len(set(dataset.classes)) != len(dataset.classes):
        raise ConformanceError(f"{case}: classes name one class twice ({dataset.classes!r:.80}); give each class a different name")
    shape = tuple(dataset.shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ConformanceError(f"{case}: shape is {dataset.shape!r:.40}; expected (channels, height, width)")
    for name in ("mean", "std"):
        values = tuple(getattr(dataset, name))
        if len(values) != shape[0] or not all(0.0 <= value <= 1.0 for value in values):
            raise ConformanceError(f"{case}: {name} is {values!r:.80}; expected {shape[0]} numbers in [0, 1], one a channel")
    for name in ("name", "source", "licence"):
        value = getattr(dataset, name)
        if not isinstance(value, str) or not value:
            raise ConformanceError(f"{case}: {name} is {value!r:.40}; expected a text for a person")
    return f"{len(dataset.classes)} classes of {'×'.join(map(str, shape))}"


def check_splits(case: Case) -> str:
    """In train, val and test: images uint8 `(n c h w)`, labels int64 `(n,)` that name classes or are UNLABELLED; train is not empty."""
    dataset = case.build()
    for name in SPLITS:
        split = getattr(dataset, name)
        images, labels = split.images, split.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConformanceError(f"{case}: {name}.images is {images.dtype} {tuple(images.shape)}; expected uint8 (n c h w)")
        if labels.dtype != torch.int64 or labels.ndim != 1 or len(labels) != len(split):
            raise ConformanceError(f"{case}: {name}.labels is {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(split)},)")
        if len(labels) and not UNLABELLED <= int(labels.min()) <= int(labels.max()) < len(dataset.classes):
            raise ConformanceError(
                f"{case}: {name}.labels name other classes than 0 … {len(dataset.classes) - 1}; an image without a label has {UNLABELLED}"
            )
    if not len(dataset.train):
        raise ConformanceError(f"{case} holds no training images")
    return " + ".join(f"{len(getattr(dataset, name)):,}" for name in SPLITS)


def check_dataset_batches(case: Case) -> str:
    """Batches of `images`, float32 `(b c h w)` of the dataset's shape, and `labels`, int64 `(b,)`; also a batch of one."""
    dataset = case.build()
    for size in (BATCH_SIZE, 1):
        batches = _batches(case, dataset, size)
        batch = next(iter(batches.epoch(0)))
        if not isinstance(batch, Mapping) or not {"images", "labels"} <= batch.keys():
            raise ConformanceError(f"{case}: a batch is {batch!r:.60}; expected a dict with images and labels")
        images, labels, count = batch["images"], batch["labels"], min(size, len(dataset.train))
        if images.dtype != torch.float32 or tuple(images.shape) != (count, *dataset.shape):
            raise ConformanceError(
                f"{case}: a batch's images are {images.dtype} {tuple(images.shape)}; expected float32 {(count, *dataset.shape)}"
            )
        if labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
            raise ConformanceError(f"{case}: a batch's labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({count},)")
        if not bool(images.isfinite().all()):
            raise ConformanceError(f"{case}: a batch holds numbers that are not finite; is a channel's std zero?")
    return f"of {BATCH_SIZE} and of one"


def check_dataset_determinism(case: Case) -> str:
    """The same epoch, seed and index give the same batch, `start` skips batches, and two ranks share the batches of one process."""
    batches = _batches(case, case.build(), BATCH_SIZE)
    first, repeated = _first(batches, 3), _first(_batches(case, case.build(), BATCH_SIZE), 3)
    if not all(torch.equal(a["images"], b["images"]) for a, b in zip(first, repeated, strict=True)):
        raise ConformanceError(f"{case}: one epoch's batches differ under one seed; draw from a generator seeded by both")
    if len(first) > 1 and not torch.equal(_first(batches, 1, start=1)[0]["images"], first[1]["images"]):
        raise ConformanceError(f"{case}: epoch(0, start=1) does not begin with the second batch; a run could not be resumed")
    halves = [_first(_batches(case, case.build(), BATCH_SIZE // 2), 1, rank=rank, world=2)[0]["labels"] for rank in range(2)]
    if not torch.equal(torch.cat(halves).sort().values, first[0]["labels"].sort().values):
        raise ConformanceError(f"{case}: two ranks' first batches are not the two halves of one process's")
    return f"{len(first)} batches, 2 ranks"


def _batches(case: Case, dataset: Any, size: int) -> Batches:
    try:
        batches = dataset.train.batches(size, shuffle=True)
    except (AttributeError, TypeError) as error:
        raise ConformanceError(
            f"{case}: train.batches({size}, shuffle=True) fails: {error}; vitkit.data.from_store gives splits with this method"
        ) from None
    if not isinstance(batches, Batches):
        raise ConformanceError(f"{case}: train.batches gives a {type(batches).__name__} without a length or epoch(number)")
    return batches


def _first(batches: Batches, count: int, **options: Any) -> list[dict[str, Tensor]]:
    """The first `count` batches of an epoch."""
    return [batch for batch, _ in zip(batches.epoch(0, seed=3, **options), range(count), strict=False)]
