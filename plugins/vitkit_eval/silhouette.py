"""The separation of the classes in a model's space."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Measurement, Scores, SplitName
from vitkit.distributed import all_reduce_sum, rank, world_size
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit_eval.features import FeatureEvaluator

DISTANCES = 2**24
"""Distances held in memory at once: 128 MiB for any number of images."""


class Silhouette(FeatureEvaluator):
    """Mean silhouette coefficient of a split's images in feature space, the true classes as clusters: `silhouette`.

    s(i) = (b − a)/max(a, b) in [−1, 1], where a is the mean Euclidean distance of image i to the other images of its class,
    and b is the smallest mean distance to the images of another class. s(i) is 0 for the only image of a class (Rousseeuw
    1987, as in scikit-learn's `silhouette_score`). Zero means that classes overlap.

    `test_size` limits the number of images (chosen by `seed`, in equal shares per class as far as possible). Time grows
    with the square of this number. Under autocast the features are computed in the precision of autocast, and distances in
    fp64.

    Ranks: each rank encodes its share of the images and measures its share of the distances. All ranks return the same score.

    Raises `UsageError` if the images have fewer than two classes, or if an image has no label. Other errors are those of
    `extract_features`.
    """

    name = "silhouette"

    def score(self, features: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        value = float(silhouettes(features.features, features.labels).mean())
        note = "mean silhouette of the true classes, Euclidean distance, from −1 to 1"
        protocol = Measurement(split, len(features.labels), chance=0.0, frozen="encoder", note=note)
        return Scores({self.name: value}, protocols={self.name: protocol})


def silhouettes(features: Tensor, labels: Tensor) -> Tensor:
    """The silhouette coefficient fp64 `(n,)` of each of features `(n d)` with clusters int64 `(n,)`.

    Ranks: each computes every W-th chunk, and all of them return all coefficients. Raises `UsageError` for fewer than two
    clusters.
    """
    names, labels = labels.unique(return_inverse=True)
    if len(names) < 2:
        raise UsageError("a silhouette needs images of at least two classes")
    points, labels = features.cpu().double(), labels.cpu()  # not every accelerator computes in fp64
    member = F.one_hot(labels).double()  # (n k)
    counts = member.sum(dim=0)
    coefficients = torch.zeros(len(points), dtype=torch.float64)
    rows = max(1, DISTANCES // len(points))
    for first in range(rows * rank(), len(points), rows * world_size()):
        chunk, clusters = points[first : first + rows], labels[first : first + rows]
        with torch.autocast(points.device.type, enabled=False):
            sums = torch.cdist(chunk, points, compute_mode="use_mm_for_euclid_dist") @ member  # (c k)
        others = counts[clusters] - 1
        a = sums.gather(1, clusters[:, None])[:, 0] / others
        b = (sums / counts).scatter(1, clusters[:, None], torch.inf).amin(dim=1)
        s = (b - a) / torch.maximum(a, b)
        coefficients[first : first + rows] = s.where((others > 0) & s.isfinite(), torch.zeros_like(s))
    if world_size() == 1:
        return coefficients
    return all_reduce_sum(coefficients.to(features.device)).cpu()  # a device that the process group communicates on
