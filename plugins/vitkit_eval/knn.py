"""Nearest neighbours among frozen features."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Scores
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit_eval.features import FrozenProbe, check_classes, classification

SIMILARITIES = 2**25
"""How many similarities of test to training images stand in memory at once: 128 MiB, whatever the training set."""


class KNN(FrozenProbe):
    """Accuracy of the nearest training images' vote: `knn_top1`, with more than ten classes `knn_top5` too.

    Each of the `k` nearest by cosine similarity s votes for its class with weight exp(s/T); of equally near images the
    earlier of the training set are nearer, and equal votes go to the class of lower number (Wu et al., arXiv 1805.01978;
    k = 20 and T = 0.07 as in DINO, arXiv 2104.14294).

    `train_size` and `test_size` cap the images, the classes as evenly as they can be had, chosen by `seed`. The
    dataset's true labels are used, also those that training never saw. Called under autocast the features are computed
    in its precision, everything else in fp32.

    Ranks: each encodes its share of the images, and every rank returns the same scores.

    Raises `UsageError` where `k` exceeds the training set, for fewer than two classes in it, and as `extract_features`.
    """

    def __init__(
        self,
        *,
        k: int = 20,
        temperature: float = 0.07,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if k < 1:
            raise UsageError(f"k is {k}; expected at least 1 neighbour")
        if not temperature > 0:
            raise UsageError(f"temperature is {temperature}; expected a positive number")
        self.k, self.temperature = k, temperature
        super().__init__(train_size=train_size, test_size=test_size, seed=seed)

    def __call__(self, model: Any, dataset: Any) -> Scores:
        self._check(len(dataset.train) if self.train_size is None else min(self.train_size, len(dataset.train)))
        return super().__call__(model, dataset)

    def score(self, train: Features, test: Features, classes: list[str]) -> Scores:
        self._check(len(train.labels))
        check_classes(train, test, classes)
        votes = vote(train.features, train.labels, test.features, len(classes), k=self.k, temperature=self.temperature)
        note = f"{self.k} nearest of {len(train.labels):,} training images, cosine, T={self.temperature:g}"
        return classification("knn", votes, test, classes, note=note)

    def _check(self, images: int) -> None:
        if self.k > images > 0:
            raise UsageError(f"k is {self.k}, but there are only {images} training images; take a smaller k")


def vote(train: Tensor, labels: Tensor, test: Tensor, classes: int, *, k: int, temperature: float) -> Tensor:
    """The weighted votes int64 `(m c)` of the `k` nearest of training features `(n d)` for test features `(m d)`.

    The nearest image's vote is 2³², and the others' are whole numbers too: their sum does not depend on its order.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = []
    for chunk in test.split(max(1, SIMILARITIES // len(train))):
        with torch.autocast(chunk.device.type, enabled=False):  # bf16 would tie neighbours that are not equally near
            similarity, index = nearest(chunk @ train.T, k)
        weight = (((similarity - similarity[:, :1]) / temperature).exp() * 2**32).long()
        votes.append(weight.new_zeros(len(chunk), classes).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest of similarities `(m n)` in falling order, and their indices: of equal ones the lower indices."""
    values, index = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    if values.shape[1] > k:
        # topk takes any of those that are equal, which matters where they straddle the k-th place.
        tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        rows, level = similarity[tied], values[tied, k - 1 : k]
        equal, places = rows == level, k - (rows > level).sum(dim=1, keepdim=True)
        rows[equal & (equal.cumsum(dim=1, dtype=torch.int32) > places)] = -torch.inf
        index[tied, :k] = rows.topk(k, dim=1).indices
    return values[:, :k], index[:, :k]
