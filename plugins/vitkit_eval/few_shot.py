"""Classification from a few images of each class."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Measurement, Scores, SplitName
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit.validation import at_least
from vitkit_eval.features import FrozenProbe
from vitkit_eval.ties import topk_accuracy

NORMAL_95 = 1.96
"""Standard errors on either side of a mean that hold 95 % of a normal distribution."""


class FewShot(FrozenProbe):
    """Accuracy from s training images of each class: `few_shot_1_top1`, `few_shot_5_top1`, `few_shot_10_top1`.

    Features are scaled to length one. The centroid of a class is the mean over its s images. An image is assigned to the
    class with the nearest centroid by Euclidean distance; equally near centroids share their places (SimpleShot's L2N, Wang
    et al., arXiv 1911.04623; nearest centroid as in prototypical networks, Snell et al., arXiv 1703.05175). The score is
    the mean over `draws` random choices of s images per class, made by `seed`, and over all images of the split. The note
    of the protocol contains the 95 % interval: ± 1.96 standard errors over the draws. In one draw, the images for a smaller
    s are among the images for a larger s.

    `train_size` limits the images from which the draws choose, and `test_size` the images on which the score is measured,
    in equal shares per class as far as possible. Under autocast the features are computed in the precision of autocast, and
    everything else in fp32.

    Ranks: each rank encodes its share of the images, and all ranks return the same scores.

    Raises `UsageError` if shots or draws are below 1, a class has fewer training images than shots, or an image has no
    label. Other errors are those of `extract_features`.
    """

    name = "few_shot"

    def __init__(
        self,
        *,
        shots: Sequence[int] = (1, 5, 10),
        draws: int = 100,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not shots or min(shots) < 1:
            raise UsageError(f"shots are {list(shots)}; expected numbers of images a class, each at least 1")
        at_least(1, draws=draws)
        self.shots, self.draws = tuple(shots), draws
        super().__init__(train_size=train_size, test_size=test_size, seed=seed)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"shots": [1, 3], "draws": 5}, {}

    def check_train(self, labels: Tensor, classes: list[str]) -> None:
        super().check_train(labels, classes)
        counts = torch.bincount(labels.cpu(), minlength=len(classes))
        least, shots = int(counts.argmin()), max(self.shots)
        if int(counts[least]) < shots:
            raise UsageError(
                f"{shots} shots need as many training images of each class, but there are only {int(counts[least])} of "
                f"{classes[least]!r}; ask for fewer shots"
            )

    def score(self, train: Features, test: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        self.check_train(train.labels, classes)
        accuracies: dict[int, list[float]] = {shots: [] for shots in self.shots}
        supports, queries = F.normalize(train.features, dim=1), F.normalize(test.features, dim=1)
        for chosen in _draws(train.labels, len(classes), max(self.shots), self.draws, self.seed):
            drawn = supports[chosen]  # (k s d)
            for shots in self.shots:
                scores = centroid_scores(queries, drawn[:, :shots].mean(dim=1))
                accuracies[shots].append(topk_accuracy(scores, test.labels))
        means, protocols = {}, {}
        for shots, hits in accuracies.items():
            values = torch.tensor(hits, dtype=torch.float64)
            name = f"few_shot_{shots}_top1"
            means[name] = float(values.mean())
            interval = ""
            if self.draws > 1:
                interval = f", ± {NORMAL_95 * float(values.std(correction=1)) / self.draws**0.5:.4f} (95 %)"
            images = f"{shots} training image{'s' if shots > 1 else ''} a class"
            protocols[name] = Measurement(
                split,
                len(test.labels),
                chance=1 / len(classes),
                frozen="encoder",
                note=f"nearest centroid of {images}, mean of {self.draws} draws{interval}",
                kind="proportion",
            )
        return Scores(means, protocols=protocols)


def centroid_scores(features: Tensor, centroids: Tensor) -> Tensor:
    """Scores `(n k)` of features `(n d)` for centroids `(k d)`, highest for the nearest centroid: x·c − ‖c‖²/2."""
    with torch.autocast(features.device.type, enabled=False):
        return features @ centroids.T - centroids.square().sum(dim=1) / 2


def _draws(labels: Tensor, classes: int, shots: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Indices `(k shots)` of images of each class, without repetition within a draw."""
    labels = labels.cpu()
    counts = torch.bincount(labels, minlength=classes)
    starts = counts.cumsum(0) - counts
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=generator)
        by_class = order[labels[order].argsort(stable=True)]
        yield by_class[starts[:, None] + torch.arange(shots)]
