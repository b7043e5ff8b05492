"""Features of a frozen encoder for images of another kind than it was trained on."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.data import ImageSplit
from vitkit.errors import UsageError
from vitkit.models import evaluating


class PatchFeatures(nn.Module):
    """The tokens of a backbone's patches behind `depth` blocks, side by side and whitened: images `(b c h w)` → `(b components)`.

    t = standardised tokens `(b patches·d)`, each number by its mean and standard deviation; the feature is t·V/√λ with the
    `components` eigenvectors V of t's covariance that have the largest eigenvalues λ, fewer where there are fewer numbers or
    images. Means and covariance are those of up to `samples` images of `split`, chosen by its classes as evenly as they can
    be had and by `seed`; no other use is made of labels.

    An embedding, and a pooled feature, keeps what tells the classes it was trained on apart; for other images the first
    blocks' tokens in their places tell more. Among cosine neighbours a few directions that all images vary in would outweigh
    the rest, which whitening prevents.

    Raises `UsageError` for a backbone without a `vit`, a split of fewer than two images, no components, and a depth that the
    `vit` has not.
    """

    mean: Tensor
    std: Tensor
    directions: Tensor

    def __init__(
        self,
        backbone: Any,
        split: ImageSplit,
        *,
        depth: int = 1,
        components: int = 256,
        samples: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "vit"):
            raise UsageError(f"{type(backbone).__name__} has no vit whose patches could be taken; give a 'vae_encoder'")
        if len(split) < 2:
            raise UsageError(f"the split to whiten by holds {len(split)} images; two are the least")
        if components < 1:
            raise UsageError(f"components is {components}; expected at least 1")
        self.backbone, self.depth = backbone, depth
        with evaluating(backbone) as device:
            batches = split.stratified_subset(samples, seed=seed).batches(500).epoch(0, device=device)
            found = torch.cat([self._tokens(batch["images"]) for batch in batches])
        self.register_buffer("mean", found.mean(dim=0).clone())
        self.register_buffer("std", found.std(dim=0, correction=0).clamp(min=1e-3))
        standard = (found - self.mean) / self.std
        with torch.autocast(found.device.type, enabled=False):  # small eigenvalues are lost in half precision
            values, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))  # ascending
        kept = min(components, len(found) - 1, len(values))
        largest = values[-kept:].flip(0).clamp(min=1e-6 * float(values[-1]))
        self.register_buffer("directions", vectors[:, -kept:].flip(1) / largest.sqrt())

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → features float32 `(b components)`."""
        standard = (self._tokens(images) - self.mean) / self.std
        with torch.autocast(images.device.type, enabled=False):
            return standard @ self.directions

    def _tokens(self, images: Tensor) -> Tensor:
        vit = self.backbone.vit
        (tokens,) = vit.forward_features(images, [self.depth])
        found: Tensor = tokens[:, vit.num_prefix_tokens :].flatten(1).float()
        return found
