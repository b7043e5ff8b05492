"""Code that evaluators share: splits and their names, preconditions, probes of frozen features, scores of a classification."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkit.contracts import UNLABELLED, Confusion, Measurement, Scores, SplitName
from vitkit.data import stratified_indices
from vitkit.errors import UsageError
from vitkit.models import Features, extract_features
from vitkit.validation import at_least, one_of
from vitkit_eval.ties import topk_accuracy

TOP5_CLASSES = 10
"""With more classes than this the top-5 accuracy is reported, too; with fewer it means little."""
PREFIXES: dict[SplitName, str] = {"train": "train_", "val": "val_", "test": ""}
"""The prefixes of the names of metrics, by split."""


def split_of(dataset: Any, split: SplitName) -> Any:
    """A split of a dataset by name; `UsageError` for another name, and for a split that is missing or empty."""
    one_of(PREFIXES, split=split)
    images = getattr(dataset, split, None)
    if images is None or len(images) == 0:
        raise UsageError(f"the {split} split of {_name(dataset)} holds no images; choose another split to evaluate on")
    return images


def named(scores: Scores, split: SplitName) -> Scores:
    """Scores with the names for a split: names for the validation split begin with `val_`."""
    return scores.prefixed(PREFIXES[split]) if PREFIXES[split] else scores


def check_labels(evaluator: str, dataset: Any, *splits: SplitName) -> None:
    """`UsageError` if an image of these splits has no label, or a label that belongs to no class."""
    for split in splits:
        labels = split_of(dataset, split).labels
        missing = int((labels == UNLABELLED).sum())
        if missing == len(labels):
            raise UsageError(
                f"{evaluator} needs labels, and the {split} images of {_name(dataset)} have none; use an evaluator without labels, "
                f"such as 'rankme', or 'transfer' to a labelled dataset"
            )
        if missing:
            raise UsageError(
                f"{evaluator} needs labels, but {missing:,} of {len(labels):,} {split} images of {_name(dataset)} have none; "
                f"give the dataset as it was before mask_labels, or use an evaluator that needs no labels, such as 'rankme'"
            )
        highest = int(labels.max())
        if highest >= len(dataset.classes):
            raise UsageError(f"a label is {highest}, but there are {len(dataset.classes)} classes: labels count from 0")


def subset_labels(split: Any, size: int | None, seed: int) -> Tensor:
    """The labels of a split, or of the `size` images that `stratified_subset(size, seed=seed)` takes of it."""
    labels: Tensor = split.labels
    if size is None or size >= len(labels):
        return labels
    return labels[stratified_indices(labels, size, seed)]


def model_classes(model: Any, dataset: Any) -> list[int]:
    """The model's number of each of a dataset's classes, by name; `UsageError` if the names are not the same.

    A model without names of classes is assumed to have the dataset's classes.
    """
    names = list(getattr(model, "classes", None) or dataset.classes)
    if sorted(names) != sorted(dataset.classes):
        raise UsageError(
            f"the model's classes are {_some(names)}, those of {_name(dataset)} are {_some(dataset.classes)}; "
            f"evaluate it on a dataset with the classes that it was trained on"
        )
    return [names.index(name) for name in dataset.classes]


def frozen_features(
    model: Any,
    dataset: Any,
    split: SplitName = "test",
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> tuple[Features, Features]:
    """The features of a dataset's training split and of `split`, or of `train_size` and `test_size` images chosen by `seed`.

    Errors and caching are those of `extract_features`.
    """
    train = extract_features(model, dataset.train, size=train_size, seed=seed)
    return train, extract_features(model, split_of(dataset, split), size=test_size, seed=seed)


class FeatureEvaluator(ABC):
    """An evaluator of the frozen features of one split: `score` gets only the features.

    `test_size` limits the number of images (chosen by `seed`, in equal shares per class as far as possible). `check` raises
    the `UsageError` of a precondition before anything is encoded.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = True

    def __init__(self, *, test_size: int | None = None, seed: int = 0) -> None:
        at_least(1, test_size=test_size)
        self.test_size, self.seed = test_size, seed

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if the evaluator cannot measure on this split."""
        if self.needs_labels:
            check_labels(self.name, dataset, split)
        split_of(dataset, split)

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        self.check(dataset, split)
        features = extract_features(model, split_of(dataset, split), size=self.test_size, seed=self.seed)
        return named(self.score(features, dataset.classes, split=split), split)

    @abstractmethod
    def score(self, features: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        """The scores of features that were extracted before, under the names of the test split."""


class FrozenProbe(ABC):
    """A classifier on frozen features. It is fitted to features of the training split and measured on features of another split.

    `train_size` and `test_size` limit the numbers of images (chosen by `seed`, in equal shares per class as far as
    possible). `check` raises the `UsageError` of a precondition before anything is encoded.
    """

    name: ClassVar[str]

    def __init__(self, *, train_size: int | None, test_size: int | None, seed: int) -> None:
        at_least(1, train_size=train_size, test_size=test_size)
        self.train_size, self.test_size, self.seed = train_size, test_size, seed

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if the probe cannot be fitted to the training split, or measured on this split."""
        check_labels(self.name, dataset, "train", split)
        self.check_train(subset_labels(dataset.train, self.train_size, self.seed), dataset.classes)

    def check_train(self, labels: Tensor, classes: list[str]) -> None:
        """Raise `UsageError` if the probe cannot be fitted to the training labels `(n,)`."""
        if len(labels.unique()) < 2:
            raise UsageError("a classifier needs training images of at least two classes")

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        self.check(dataset, split)
        sizes: dict[str, Any] = {"train_size": self.train_size, "test_size": self.test_size, "seed": self.seed}
        train, test = frozen_features(model, dataset, split, **sizes)
        return named(self.score(train, test, dataset.classes, split=split), split)

    @abstractmethod
    def score(self, train: Features, test: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        """The scores of features that were extracted before, under the names of the test split."""


def classification(
    name: str,
    scores: Tensor,
    labels: Tensor,
    classes: list[str],
    *,
    split: SplitName,
    note: str,
    frozen: str = "encoder",
) -> Scores:
    """`<name>_top1`, with more than ten classes `<name>_top5`, and the confusion matrix, from scores `(n k)`."""
    k = len(classes)
    tops = (1, 5) if k > TOP5_CLASSES else (1,)
    counts = confusion_matrix(labels, scores.argmax(dim=1), k)
    return Scores(
        {f"{name}_top{top}": topk_accuracy(scores, labels, top) for top in tops},
        protocols={
            f"{name}_top{top}": Measurement(
                split, len(labels), chance=top / k, frozen=frozen, note=note, kind="proportion"
            )
            for top in tops
        },
        figures={f"{name}_confusion": Confusion(counts.cpu().numpy(), classes)},
    )


def confusion_matrix(true: Tensor, predicted: Tensor, k: int) -> Tensor:
    """Counts `(k k)`: row the true class, column the predicted one."""
    return torch.bincount(true * k + predicted, minlength=k * k).view(k, k)


def _name(dataset: Any) -> str:
    return str(getattr(dataset, "name", "this dataset"))


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
