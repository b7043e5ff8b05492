"""How far apart the classes lie in a model's space."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Measurement, Scores
from vitkit.errors import UsageError
from vitkit.models import Features, extract_features
from vitkit_eval.features import check_labels

DISTANCES = 2**24
"""How many distances stand in memory at once: 128 MiB, however many images there are."""


class Silhouette:
    """Mean silhouette coefficient of the test images in feature space, the true classes as clusters: `silhouette`.

    s(i) = (b − a)/max(a, b) in [−1, 1], a being image i's mean Euclidean distance to the others of its class, b the
    least mean distance to another class; 0 for the only image of its class (Rousseeuw 1987, as scikit-learn's
    `silhouette_score`). Zero means classes that lie in one another.

    `test_size` caps the images, the classes as evenly as they can be had, chosen by `seed`: time grows with its square.
    Called under autocast the features are computed in its precision, distances in fp64.

    Ranks: each encodes its share of the images, and every rank returns the same score.

    Raises `UsageError` for fewer than two classes among the test images, and as `extract_features`.
    """

    def __init__(self, *, test_size: int | None = None, seed: int = 0) -> None:
        self.test_size, self.seed = test_size, seed

    def __call__(self, model: Any, dataset: Any) -> Scores:
        split = dataset.test if self.test_size is None else dataset.test.stratified_subset(self.test_size, seed=self.seed)
        return self.score(extract_features(model, split), dataset.classes)

    def score(self, test: Features, classes: list[str]) -> Scores:
        """The score of features that were extracted before: several evaluators can share them."""
        check_labels(test, classes)
        value = float(silhouettes(test.features, test.labels).mean())
        note = "mean silhouette of the true classes, Euclidean distance, from −1 to 1"
        protocol = Measurement("test", len(test.labels), chance=0.0, frozen="encoder", note=note)
        return Scores({"silhouette": value}, protocols={"silhouette": protocol})


def silhouettes(features: Tensor, labels: Tensor) -> Tensor:
    """The silhouette coefficient fp64 `(n,)` of each of features `(n d)` with clusters int64 `(n,)`.

    Raises `UsageError` where there are fewer than two clusters.
    """
    names, labels = labels.unique(return_inverse=True)
    if len(names) < 2:
        raise UsageError("a silhouette needs images of at least two classes")
    points, labels = features.cpu().double(), labels.cpu()  # not every accelerator computes in fp64
    member = F.one_hot(labels).double()  # (n k)
    counts = member.sum(dim=0)
    found = []
    size = max(1, DISTANCES // len(points))
    for chunk, own in zip(points.split(size), labels.split(size), strict=True):
        with torch.autocast(points.device.type, enabled=False):
            sums = torch.cdist(chunk, points, compute_mode="use_mm_for_euclid_dist") @ member  # (c k)
        place = own[:, None]
        others = counts[own] - 1
        a = sums.gather(1, place)[:, 0] / others
        b = (sums / counts).scatter(1, place, torch.inf).amin(dim=1)
        s = (b - a) / torch.maximum(a, b)
        found.append(s.where((others > 0) & s.isfinite(), torch.zeros_like(s)))
    return torch.cat(found)
