"""Classifying from a handful of images of each class."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Measurement, Scores
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit_eval.features import FrozenProbe, check_classes


class FewShot(FrozenProbe):
    """Accuracy from s training images of each class: `few_shot_1_top1`, `few_shot_5_top1`, `few_shot_10_top1`.

    Features are scaled to length one; a test image belongs to the class whose centroid, the mean over its s images, is
    nearest by Euclidean distance, of equally near ones to the class of lower number (SimpleShot's L2N, Wang et al.,
    arXiv 1911.04623; nearest centroid as in prototypical networks, Snell et al., arXiv 1703.05175). Reported is the mean
    over `draws` of s images a class, chosen by `seed`, on all test images; the protocol's note has its 95 % interval,
    ± 1.96 standard errors over the draws. The s images of a draw are among those of a larger s.

    `train_size` and `test_size` cap the images to draw from and to test on, the classes as evenly as they can be had.
    Called under autocast the features are computed in its precision, everything else in fp32.

    Ranks: each encodes its share of the images, and every rank returns the same scores.

    Raises `UsageError` for shots or draws below 1, where a class has fewer training images than the shots ask for, and
    as `extract_features`.
    """

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
        if draws < 1:
            raise UsageError(f"draws is {draws}; expected at least 1")
        self.shots, self.draws = tuple(shots), draws
        super().__init__(train_size=train_size, test_size=test_size, seed=seed)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"shots": [1, 3], "draws": 5}, {}

    def score(self, train: Features, test: Features, classes: list[str]) -> Scores:
        check_classes(train, test, classes)
        found: dict[int, list[float]] = {shots: [] for shots in self.shots}
        known, queries = F.normalize(train.features, dim=1), F.normalize(test.features, dim=1)
        for chosen in _draws(train.labels, classes, max(self.shots), self.draws, self.seed):
            drawn = known[chosen]  # (k s d)
            for shots in self.shots:
                near = nearest_centroid(queries, drawn[:, :shots].mean(dim=1))
                found[shots].append(float((near == test.labels).float().mean()))
        scores, protocols = {}, {}
        for shots, hits in found.items():
            values = torch.tensor(hits, dtype=torch.float64)
            mean = float(values.mean())
            error = float(values.std(correction=1)) / self.draws**0.5 if self.draws > 1 else float("nan")
            name = f"few_shot_{shots}_top1"
            scores[name] = mean
            interval = f", ± {1.96 * error:.4f} (95 %)" if self.draws > 1 else ""
            images = f"{shots} training image{'s' if shots > 1 else ''} a class"
            protocols[name] = Measurement(
                "test",
                len(test.labels),
                chance=1 / len(classes),
                frozen="encoder",
                note=f"nearest centroid of {images}, mean of {self.draws} draws{interval}",
            )
        return Scores(scores, protocols=protocols)


def nearest_centroid(features: Tensor, centroids: Tensor) -> Tensor:
    """The number of the centroid `(k d)` nearest to each of features `(n d)`: int64 `(n,)`."""
    with torch.autocast(features.device.type, enabled=False):
        # argmin ‖x − c‖² = argmax x·c − ‖c‖²/2
        return (features @ centroids.T - centroids.square().sum(dim=1) / 2).argmax(dim=1)


def _draws(labels: Tensor, classes: list[str], shots: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Indices `(k shots)` of images of each class, without repetition within a draw."""
    labels = labels.cpu()
    counts = torch.bincount(labels, minlength=len(classes))
    if int(counts.min()) < shots:
        least = int(counts.argmin())
        raise UsageError(
            f"{shots} shots need as many training images of each class, but there are only {int(counts[least])} of "
            f"{classes[least]!r}; ask for fewer shots"
        )
    starts = counts.cumsum(0) - counts
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=generator)
        by_class = order[labels[order].argsort(stable=True)]
        yield by_class[starts[:, None] + torch.arange(shots)]
