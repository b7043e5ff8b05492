"""Monitors that need no labels: how many dimensions the features use, and whether they collapse."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Measurement, Scores, SplitName
from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError, VitkitError
from vitkit.models import Features, encode_image, evaluating
from vitkit.transforms import Compose, RandomAffine, Transform
from vitkit.validation import at_least, positive
from vitkit_eval.features import FeatureEvaluator, named, split_of

EPSILON = 1e-7
"""Added to each share of the spectrum, as in RankMe for features in fp32."""
AUGMENT = Compose([RandomAffine(degrees=15, translate=0.1, scale=(0.85, 1.15), shear=10)])
"""The views of `LiDAR` where no other transform is given: for images of any kind and number of channels."""


class RankMe(FeatureEvaluator):
    """The effective number of dimensions of the features, which is the exponential of the entropy of their spectrum: `rankme`.

        RankMe(Z) = exp(−Σ_k p_k ln p_k),   p_k = σ_k(Z) / Σ_j σ_j(Z) + 1e-7,

    σ_k are the singular values of the features Z `(n d)`. RankMe is 1 if all features are on one line, and min(n, d) if all
    directions vary equally. Z is not centred, so RankMe of a constant feature vector is also 1. Among models of one method,
    a higher value goes with better linear probes (Garrido et al., arXiv 2210.02885). Values for different widths d are not
    comparable.

    `test_size` limits the number of images (chosen by `seed`, in equal shares per label as far as possible); The full range
    needs at least as many images as dimensions. Labels are not used. Under autocast the features are computed in the
    precision of autocast, and the spectrum in fp64.

    Ranks: each rank encodes its share of the images, and all ranks return the same score. Errors are those of
    `extract_features`.
    """

    name = "rankme"
    needs_labels = False

    def score(self, features: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        z = _double(features.features)
        spectrum = torch.linalg.svdvals(z)
        shares = spectrum / spectrum.sum().clamp(min=torch.finfo(spectrum.dtype).tiny) + EPSILON
        value = float((-shares * shares.log()).sum().exp())
        note = f"effective dimensions of {z.shape[1]}, from the entropy of the singular values"
        return _single(self.name, value, split, len(z), note, unit="dimensions")


class AlphaReQ(FeatureEvaluator):
    """The decay of the eigenvalues of the features' covariance, λ_j ∝ j^−α: `alpha_req`.

    α is the negative slope of the least-squares line through (ln j, ln λ_j), j = 1 … of the eigenvalues above 1e-6·λ₁.
    Features with α near 1 tend to generalise best. With a larger α, few directions dominate. With a smaller α, the features
    contain many directions of noise (Agrawal et al., α-ReQ, NeurIPS 2022). The direction of the metric is "min", because a
    collapse raises α. Below 1, a lower value is not better.

    `test_size` limits the number of images (chosen by `seed`, in equal shares per label as far as possible). Labels are not
    used. Under autocast the features are computed in the precision of autocast, and the spectrum in fp64.

    Ranks: each rank encodes its share of the images, and all ranks return the same score. Raises `UsageError` if fewer than
    two eigenvalues are above this limit. Other errors are those of `extract_features`.
    """

    name = "alpha_req"
    needs_labels = False
    floor = 1e-6

    def score(self, features: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        z = _double(features.features)
        z = z - z.mean(dim=0)
        eigenvalues = torch.linalg.svdvals(z).square() / len(z)  # descending
        kept = eigenvalues[eigenvalues > self.floor * eigenvalues[0]]
        if len(kept) < 2:
            raise UsageError(
                "alpha_req needs features that vary in two directions at least; these have collapsed to a line or a point"
            )
        x, y = torch.arange(1, len(kept) + 1, dtype=torch.float64).log(), kept.log()
        x = x - x.mean()
        value = -float((x * (y - y.mean())).sum() / x.square().sum())
        note = f"power-law exponent of {len(kept)} eigenvalues of the covariance; 1 is the ideal, collapse is higher"
        return _single(self.name, value, split, len(z), note, direction="min")


class FeatureStd(FeatureEvaluator):
    """The mean over dimensions of the standard deviation of features that are scaled to length one: `feature_std`.

    The value is multiplied by √d. It is 1 if features are spread evenly over the sphere in d dimensions, and 0 if all
    features are equal (Chen and He, SimSiam, arXiv 2011.10566, who plot it against 1/√d).

    `test_size` limits the number of images (chosen by `seed`, in equal shares per label as far as possible). Labels are not
    used. Under autocast the features are computed in the precision of autocast, and the deviation in fp64.

    Ranks: each rank encodes its share of the images, and all ranks return the same score. Errors are those of
    `extract_features`.
    """

    name = "feature_std"
    needs_labels = False

    def score(self, features: Features, classes: list[str], *, split: SplitName = "test") -> Scores:
        z = F.normalize(_double(features.features), dim=1)
        value = float(z.std(dim=0, correction=0).mean()) * z.shape[1] ** 0.5
        note = "standard deviation of unit features times √d: 1 is evenly spread, 0 collapsed"
        return _single(self.name, value, split, len(z), note)


class LiDAR:
    """The effective number of dimensions that tell images from their augmented views: `lidar`.

        Σ_b = cov of the images' means over views,   Σ_w = mean covariance of the views of an image + δI,
        LiDAR = exp(−Σ_k p_k ln p_k),   p_k = λ_k / Σ_j λ_j + 1e-7,   λ_k the eigenvalues of Σ_w^−½ Σ_b Σ_w^−½.

    It is RankMe of a linear discriminant analysis in which every image is a class. Directions in which the views of one
    image differ do not count (Thilak et al., arXiv 2312.04000; there 1,000 images, 50 views, δ = 1e-4). LiDAR is at least
    1. It is at most the number of dimensions, and at most the number of images minus one.

    `views` augmented views are made per image, of `images` images of the split (in equal shares per label as far as
    possible). `seed` chooses images and views. `augment` is the transform, by default a random affine one. Give the
    transform of the training to measure the invariance that training should give. Labels are not used. Under autocast the
    features are computed in the precision of autocast, and the rest in fp64.

    Ranks: each rank encodes its share of the images, and all ranks return the same score. Raises `UsageError` if there are
    fewer than two images or views, δ is not positive, or the split is empty, and `VitkitError` if features are not finite.
    """

    name = "lidar"

    def __init__(
        self, *, images: int = 1000, views: int = 10, delta: float = 1e-4, augment: Transform | None = None, seed: int = 0
    ) -> None:
        at_least(2, images=images, views=views)
        positive(delta=delta)
        self.images, self.views, self.delta, self.seed = images, views, delta, seed
        self.augment = AUGMENT if augment is None else augment

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"images": 9, "views": 3}, {}

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if the split has fewer than two images."""
        if len(split_of(dataset, split)) < 2:
            raise UsageError(f"lidar compares images; the {split} split holds only one")

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        self.check(dataset, split)
        images = split_of(dataset, split).stratified_subset(self.images, seed=self.seed)
        z = view_features(model, images, augment=self.augment, views=self.views, seed=self.seed)
        value = lidar(z, delta=self.delta)
        note = f"effective dimensions of {z.shape[2]}, {self.views} augmented views of each image, δ={self.delta:g}"
        return named(_single(self.name, value, split, len(z), note, unit="dimensions"), split)


def view_features(model: Any, split: Any, *, augment: Transform, views: int, seed: int) -> Tensor:
    """Features float64 `(n v d)` on the CPU, the views drawn for each image by the seed, on any number of ranks.

    Raises `VitkitError` for features that are not finite.
    """
    features = []
    with evaluating(model) as device:
        # One image per batch would draw the same views on any number of ranks. Complete batches per rank do so too, and are faster.
        for number, part in enumerate(torch.arange(len(split)).split(100)):
            batches = split.subset(part).batches(len(part), augment=augment, views=views)
            batch = next(iter(batches.epoch(number, seed=seed, device=device)))
            images = batch["images"].unflatten(0, (-1, 1)) if views == 1 else batch["images"]  # (b v c h w)
            share = images.tensor_split(world_size())[rank()]
            count = len(share)
            rows = share.flatten(0, 1) if count else images[0]
            encoded = encode_image(model, rows).float().unflatten(0, (-1, views))[:count]
            features.append(all_gather(encoded))
    joined = torch.cat(features)
    if not bool(joined.isfinite().all()):
        raise VitkitError("the model's features are not finite: it has diverged, or its weights are damaged")
    return _double(joined)


def lidar(features: Tensor, *, delta: float = 1e-4) -> float:
    """LiDAR of features `(n v d)` of v views of n images; see `LiDAR`."""
    means = features.mean(dim=1)
    centred = means - means.mean(dim=0)
    between = centred.T @ centred / (len(means) - 1)
    residual = (features - means[:, None]).flatten(0, 1)
    within = residual.T @ residual / (len(means) * (features.shape[1] - 1))
    within += delta * torch.eye(within.shape[0], dtype=within.dtype)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.sqrt() @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(whiten @ between @ whiten).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny) + EPSILON
    return float((-shares * shares.log()).sum().exp())


def _double(features: Tensor) -> Tensor:
    return features.cpu().double()  # not every accelerator computes in fp64


def _single(name: str, value: float, split: SplitName, samples: int, note: str, **protocol: Any) -> Scores:
    return Scores({name: value}, protocols={name: Measurement(split, samples, frozen="encoder", note=note, **protocol)})


__all__ = ["AUGMENT", "AlphaReQ", "FeatureStd", "LiDAR", "RankMe", "lidar", "view_features"]
