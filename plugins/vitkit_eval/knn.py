"""Nearest neighbours among frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Scores, SplitName
from vitkit.distributed import all_reduce_sum, rank, world_size
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit.validation import at_least, positive
from vitkit_eval.features import FrozenProbe, classification
from vitkit_eval.ties import highest

SIMILARITIES = 2**25
"""Similarities of test to training images held in memory at once: 128 MiB for a training set of any size."""


class KNN(FrozenProbe):
    """Accuracy of a vote of the nearest training images: `knn_top1`, and with more than ten classes `knn_top5`.

    The `k` nearest training images by cosine similarity s vote for their classes, with weight exp(s/T). Among equally near
    images, the earlier ones of the training set vote. Classes with equal votes share their places. A class without a vote
    is never a hit (Wu et al., arXiv 1805.01978; k = 20 and T = 0.07 as in DINO, arXiv 2104.14294).

    `train_size` and `test_size` limit the numbers of images (chosen by `seed`, in equal shares per class as far as
    possible). The true labels of the dataset are used, also for images whose labels were not used in training. Under
    autocast the features are computed in the precision of autocast, and everything else in fp32.

    Ranks: each rank encodes its share of the images and counts the votes for its share. All ranks return the same scores.

    Raises `UsageError` if `k` exceeds the training set, for fewer than two classes in it, for images without a label, and
    as `extract_features` does.
    """

    name = "knn"

    def __init__(
        self,
        *,
        k: int = 20,
        temperature: float = 0.07,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
    ) -> None:
        at_least(1, k=k)
        positive(temperature=temperature)
        self.k, self.temperature = k, temperature
        super().__init__(train_size=train_size, test_size=test_size, seed=seed)

    def check_train(self, labels: Tensor, classes: list[str]) -> None:
        if self.k > len(labels):
            raise UsageError(f"k is {self.k}, but there are only {len(labels)} training images; take a smaller k")
        super().check_train(labels, classes)

    def score(self, train: Features, test: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        self.check_train(train.labels, classes)
        votes = vote(train.features, train.labels, test.features, len(classes), k=self.k, temperature=self.temperature)
        votes = votes.cpu().double()  # not every accelerator computes in fp64, which holds these whole numbers exactly
        scores = votes.where(votes > 0, -torch.inf)
        note = f"{self.k} nearest of {len(train.labels):,} training images, cosine, T={self.temperature:g}"
        return classification(self.name, scores, test.labels.cpu(), classes, split=split, note=note)


def vote(train: Tensor, labels: Tensor, test: Tensor, classes: int, *, k: int, temperature: float) -> Tensor:
    """The weighted votes int64 `(m c)` of the `k` nearest of training features `(n d)` for test features `(m d)`.

    All votes are whole numbers, and the vote of the nearest image is 2³². Sums of votes therefore do not depend on their
    order. Ranks: each of W ranks counts every W-th chunk of the test features, and all ranks return all votes.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = torch.zeros(len(test), classes, dtype=torch.int64, device=test.device)
    rows = max(1, SIMILARITIES // len(train))
    for first in range(rows * rank(), len(test), rows * world_size()):
        chunk = test[first : first + rows]
        with torch.autocast(chunk.device.type, enabled=False):  # bf16 would tie neighbours that are not equally near
            similarity, index = highest(chunk @ train.T, k)
        weight = (((similarity - similarity[:, :1]) / temperature).exp() * 2**32).long()
        votes[first : first + rows].scatter_add_(1, labels[index], weight)
    return all_reduce_sum(votes)
