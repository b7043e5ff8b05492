"""Frozen features of a dataset's images, and how predictions on them are counted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.contracts import Confusion, Measurement, Scores
from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError, VitkitError
from vitkit.models import encode_image

MANY = 10
"""With more classes than these the top-5 accuracy is reported too; with fewer it says next to nothing."""


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
    device = parameter.device if parameter is not None else torch.device("cpu")
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            yield device
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Kept:
    """Features with the model and the split that they are of, so that neither's `id` is given to another meanwhile."""

    model: Any
    split: Any
    features: Features


_shared: ContextVar[dict[Any, _Kept] | None] = ContextVar("shared features", default=None)


@contextmanager
def feature_cache() -> Iterator[None]:
    """Within this block a model's features of a split are computed once, for however many evaluators ask for them.

        with feature_cache():
            epoch.log(*(evaluator(model, data) for evaluator in evaluators))

    What is asked for under another precision, or after the model's weights have changed, is computed anew. They are kept in
    memory until the block ends: 4·n·d bytes for n images and d features. Blocks within blocks share with the outermost.
    """
    if _shared.get() is not None:
        yield
        return
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def _once(model: Any, split: Any, what: tuple[Any, ...], make: Callable[[], Features]) -> Features:
    kept = _shared.get()
    if kept is None:
        return make()
    weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    # A tensor's version counts what has been written into it; those made under inference mode have none.
    state = tuple((id(tensor), None if tensor.is_inference() else tensor._version) for tensor in weights)
    device = weights[0].device.type if weights else "cpu"
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    key = (id(model), id(split), what, state, precision)
    if key not in kept:
        kept[key] = _Kept(model, split, make())
    return kept[key].features


def extract_features(model: Any, split: Any, *, batch_size: int = 500) -> Features:
    """The pooled features of every image of a split, once each, in the split's order, on every rank.

    The model's own `encode_image(images) -> (b d)` is asked, or else the mean over its tokens `(b n d)` is taken. Called
    under autocast the features are computed in its precision; they are returned in float32. Labels are the split's, so
    hidden ones are refused. Raises `UsageError` for an empty split, for hidden labels and for a model that returns
    something else, and `VitkitError` for features that are not finite. Within `feature_cache()` they are computed once
    for all who ask.
    """
    return _once(model, split, (batch_size,), lambda: _extract(model, split, batch_size))


def _extract(model: Any, split: Any, batch_size: int) -> Features:
    if len(split) == 0:
        raise UsageError("the split to evaluate on holds no images")
    if int(split.labels.min()) < 0:
        raise UsageError("the split to evaluate on hides labels (-1); give the dataset as it was before mask_labels")
    found, labels = [], []
    with evaluating(model) as device:
        for batch in split.batches(batch_size).epoch(0, device=device, rank=rank(), world=world_size()):
            # Ranks hold consecutive parts of each batch, so gathering batch by batch keeps the split's order.
            found.append(all_gather(_encode(model, batch["images"])))
            labels.append(all_gather(batch["labels"]))
    features, targets = torch.cat(found), torch.cat(labels)
    if not bool(features.isfinite().all()):
        raise VitkitError("the model's features are not finite: it has diverged, or its weights are damaged")
    return Features(features.clone(), targets.clone())  # clones are no inference tensors: a probe may train on them


def _encode(model: Any, images: Tensor) -> Tensor:
    count = len(images)
    if count == 0:  # one rank's share of the last batch: a model need not take it, and any image tells the width
        images = images.new_zeros(1, *images.shape[1:])
    return encode_image(model, images)[:count].float()


def frozen_features(
    model: Any, dataset: Any, *, train_size: int | None = None, test_size: int | None = None, seed: int = 0
) -> tuple[Features, Features]:
    """The features of a dataset's training and test split, or of `train_size` and `test_size` images chosen by `seed`.

    Capped splits hold the classes as evenly as they can be had. Errors, and sharing, are those of `extract_features`.
    """

    def features(split: Any, size: int | None) -> Features:
        if size is None:
            return extract_features(model, split)
        return _once(model, split, (size, seed), lambda: extract_features(model, split.stratified_subset(size, seed=seed)))

    return features(dataset.train, train_size), features(dataset.test, test_size)


class FrozenProbe(ABC):
    """An evaluator of frozen features: called with `(model, dataset)` it extracts them, and its `score` looks at nothing else.

    `train_size` and `test_size` cap the images, chosen by `seed`, as `frozen_features` does.
    """

    def __init__(self, *, train_size: int | None, test_size: int | None, seed: int) -> None:
        self.train_size, self.test_size, self.seed = train_size, test_size, seed

    def __call__(self, model: Any, dataset: Any) -> Scores:
        train, test = frozen_features(model, dataset, train_size=self.train_size, test_size=self.test_size, seed=self.seed)
        return self.score(train, test, dataset.classes)

    @abstractmethod
    def score(self, train: Features, test: Features, classes: list[str]) -> Scores:
        """The scores of features that were extracted before: several evaluators can share them."""


def check_labels(found: Features, classes: list[str]) -> None:
    """`UsageError` where a label belongs to no class."""
    highest = int(found.labels.max())
    if highest >= len(classes):
        raise UsageError(f"a label is {highest}, but there are {len(classes)} classes: labels count from 0")


def check_classes(train: Features, test: Features, classes: list[str]) -> None:
    """`UsageError` where there is nothing to tell apart, or where a label belongs to no class."""
    for features in (train, test):
        check_labels(features, classes)
    if len(train.labels.unique()) < 2:
        raise UsageError("a classifier needs training images of at least two classes")


def classification(
    name: str, scores: Tensor, test: Features, classes: list[str], *, note: str, frozen: str = "encoder"
) -> Scores:
    """`<name>_top1`, with more than ten classes `<name>_top5` too, and the confusion matrix, of scores `(n k)`."""
    k = len(classes)
    tops = (1, 5) if k > MANY else (1,)
    counts = confusion_matrix(test.labels, scores.argmax(dim=1), k)
    return Scores(
        {f"{name}_top{top}": topk_accuracy(scores, test.labels, top) for top in tops},
        protocols={
            f"{name}_top{top}": Measurement("test", len(test.labels), chance=top / k, frozen=frozen, note=note)
            for top in tops
        },
        figures={f"{name}_confusion": Confusion(counts.cpu().numpy(), classes)},
    )


def confusion_matrix(true: Tensor, predicted: Tensor, k: int) -> Tensor:
    """Counts `(k k)`: row the true class, column the predicted one."""
    return torch.bincount(true * k + predicted, minlength=k * k).view(k, k)


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """The share of samples whose label is among the `k` highest of scores `(n c)`.

    Of equal scores the class of lower number stands first, as in `argmax`; a score that is no number is no hit.
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    ahead = ~(scores <= own) | ((scores == own) & lower)
    return float((ahead.sum(dim=1) < k).float().mean())
