"""Nearest neighbours among frozen features."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Confusion, Measurement, Scores
from vitkit.errors import UsageError
from vitkit_eval.features import confusion_matrix, extract_features, topk_accuracy

CHUNK = 1_000
"""Test images whose similarities to the whole training set stand in memory at once: 240 MB for 60,000 of those."""


class KNN:
    """Accuracy of the nearest training images' vote: `knn_top1`.

    Each of the `k` nearest by cosine similarity s votes for its class with weight exp(s/T); equal votes go to the
    class of lower number (Wu et al., arXiv 1805.01978; k=20, T=0.07 as in DINO, arXiv 2104.14294). `train_size` caps
    the training images. The dataset's true labels are used. Raises `UsageError` where `k` exceeds the training set.
    """

    def __init__(
        self, *, k: int = 20, temperature: float = 0.07, train_size: int | None = None, seed: int = 0
    ) -> None:
        if k < 1:
            raise UsageError(f"k is {k}; expected at least 1 neighbour")
        if not temperature > 0:
            raise UsageError(f"temperature is {temperature}; expected a positive number")
        self.k, self.temperature, self.train_size, self.seed = k, temperature, train_size, seed

    def __call__(self, model: Any, dataset: Any) -> Scores:
        split = dataset.train if self.train_size is None else dataset.train.take(self.train_size, seed=self.seed)
        if self.k > len(split):
            raise UsageError(f"k is {self.k}, but there are only {len(split)} training images; take a smaller k")
        train, test = extract_features(model, split), extract_features(model, dataset.test)
        classes = len(dataset.classes)
        votes = vote(train.features, train.labels, test.features, classes, k=self.k, temperature=self.temperature)
        return Scores(
            {"knn_top1": topk_accuracy(votes, test.labels)},
            protocols={
                "knn_top1": Measurement(
                    split="test",
                    samples=len(test.labels),
                    chance=1 / classes,
                    frozen="encoder",
                    note=f"{self.k} nearest of {len(train.labels):,} training images, cosine, T={self.temperature:g}",
                )
            },
            pictures={
                "knn_confusion": Confusion(confusion_matrix(test.labels, votes.argmax(1), classes).numpy(), dataset.classes)
            },
        )


def vote(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, *, k: int, temperature: float
) -> Tensor:
    """The weighted votes `(m c)` of the `k` nearest of training features `(n d)` for test features `(m d)`."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = []
    for chunk in test.split(CHUNK):
        with torch.autocast(chunk.device.type, enabled=False):  # bf16 would tie neighbours that are not equally near
            similarity, index = (chunk @ train.T).topk(k, dim=1)
        # Relative to the nearest, so that exp cannot overflow at small temperatures; the vote's order is the same.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(chunk), classes, device=chunk.device).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)
