"""Frozen features of a dataset's images, and how predictions on them are counted."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from vitkit.contracts import Confusion, Measurement, Scores
from vitkit.errors import UsageError
from vitkit.models import Features, extract_features

MANY = 10
"""With more classes than these the top-5 accuracy is reported too; with fewer it says next to nothing."""


def frozen_features(
    model: Any, dataset: Any, *, train_size: int | None = None, test_size: int | None = None, seed: int = 0
) -> tuple[Features, Features]:
    """The features of a dataset's training and test split, or of `train_size` and `test_size` images chosen by `seed`.

    Errors and caching are those of `extract_features`.
    """

    train = extract_features(model, dataset.train, size=train_size, seed=seed)
    return train, extract_features(model, dataset.test, size=test_size, seed=seed)


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
