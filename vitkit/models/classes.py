"""Classes by name: a model and a dataset may list the same classes in different orders."""

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitkit.contracts import UNLABELLED
from vitkit.errors import UsageError, printable


def with_class_order(dataset: Any, classes: Sequence[str]) -> Any:
    """The dataset with its classes, and the labels of its splits, in the order of `classes`, if both name the same classes.

    Numbers are compared as numbers: "01" and "1" are one class. A dataset with other classes is returned as it is; an evaluator that
    needs the model's classes refuses it. Raises `UsageError` for a dataset whose labels cannot be replaced.
    """
    names, order = [_key(name) for name in dataset.classes], [_key(name) for name in classes]
    if list(dataset.classes) == list(classes) or sorted(names) != sorted(order) or len(set(names)) < len(names):
        return dataset
    numbers = torch.tensor([order.index(name) for name in names])
    if not is_dataclass(dataset):
        differing = [f"{a} ≠ {b}" for a, b in zip(dataset.classes, classes, strict=True) if a != b]
        raise UsageError(
            f"{printable(dataset.name)} lists the model's classes in another order ({printable(', '.join(differing[:3]))}), and its labels "
            f"cannot be replaced; give a dataset in the model's order"
        )
    splits = {
        name: replace(split, labels=_renumbered(split.labels, numbers))
        for name in ("train", "val", "test")
        if (split := getattr(dataset, name, None)) is not None
    }
    return replace(dataset, classes=list(classes), **splits)  # type: ignore[type-var]


def _key(name: str) -> str:
    return str(int(name)) if name.isdecimal() and name.isascii() else name


def _renumbered(labels: Tensor, numbers: Tensor) -> Tensor:
    """Labels with the new numbers of their classes; labels of no class are unchanged."""
    has_class = (labels != UNLABELLED) & (labels < len(numbers))
    return torch.where(has_class, numbers[labels.clamp(0, len(numbers) - 1)], labels)


__all__ = ["with_class_order"]
