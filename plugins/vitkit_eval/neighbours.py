"""Images that are near each other in feature space: a score without labels, and a sheet of images to look at."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Measurement, Scores, Sheet, SplitName
from vitkit.errors import UsageError
from vitkit.models import extract_features
from vitkit.transforms import Transform
from vitkit.validation import at_least
from vitkit_eval.collapse import AUGMENT, view_features
from vitkit_eval.features import named, split_of
from vitkit_eval.ties import topk_accuracy

ROW = 8
"""Images in a row of the sheet: one, and its nearest others."""


class Neighbours:
    """How often an augmented view of an image is nearest to that image, `view_top1`, and a sheet of nearest images.

        view_top1 = mean_i [argmax_j cos(E(t_i(x_i)), E(x_j)) = i]

    Equal cosines are in random order, so that constant features score chance, 1/n for n images. The task is instance
    discrimination (Wu et al., arXiv 1805.01978). The figure `neighbours` has `rows` rows: an image of the split, then the
    other images nearest to it, with their cosines.

    `images` of the split, in equal shares of the labels as far as possible, take part, chosen by `seed`, which draws the
    views too. `augment` is the transform t, a random affine one by default; pass that of the training. Labels are not used.
    Under autocast the features are computed in its precision, cosines in fp32.

    Ranks: each rank encodes its share of the images, and all ranks return the same score. Raises `UsageError` for fewer
    than two images and an empty split; `VitkitError` for features that are not finite.
    """

    name = "neighbours"

    def __init__(self, *, images: int = 1000, rows: int = 6, augment: Transform | None = None, seed: int = 0) -> None:
        at_least(2, images=images)
        at_least(1, rows=rows)
        self.images, self.rows, self.seed = images, rows, seed
        self.augment = AUGMENT if augment is None else augment

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` where the split has fewer than two images."""
        if len(split_of(dataset, split)) < 2:
            raise UsageError(f"neighbours compares images; the {split} split holds only one")

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        self.check(dataset, split)
        images = split_of(dataset, split).stratified_subset(self.images, seed=self.seed).in_memory()
        features = F.normalize(extract_features(model, images).features.cpu(), dim=1)
        views = view_features(model, images, augment=self.augment, views=1, seed=self.seed)[:, 0].float()
        n = len(features)
        value = topk_accuracy(F.normalize(views, dim=1) @ features.T, torch.arange(n), 1)
        note = "an augmented view among the features of all images, cosine"
        scores = Scores(
            {"view_top1": value},
            protocols={"view_top1": Measurement(split, n, chance=1 / n, frozen="encoder", note=note, kind="proportion")},
            figures={self.name: self._sheet(images, features)},
        )
        return named(scores, split)

    def _sheet(self, images: Any, features: Tensor) -> Sheet:
        n = len(features)
        chosen = torch.linspace(0, n - 1, min(self.rows, n)).long()
        cosines = features[chosen] @ features.T
        cosines[torch.arange(len(chosen)), chosen] = -torch.inf  # an image is no neighbour of itself
        near, numbers = cosines.topk(min(ROW, n) - 1, dim=1)
        shown = torch.cat([chosen[:, None], numbers], dim=1).flatten()
        pixels = images.preprocessing.pixels(images.images.index_select(0, shown)).clamp(0, 1)
        captions = [text for row in near.tolist() for text in ("image", *(f"{cosine:.2f}" for cosine in row))]
        return Sheet(pixels.numpy(), captions, columns=min(ROW, n))


__all__ = ["Neighbours"]
