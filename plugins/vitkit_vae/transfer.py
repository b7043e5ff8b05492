"""Features of a frozen encoder for images of another kind than it was trained on."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.batches import ImageSplit
from vitkit.errors import UsageError
from vitkit_eval import evaluating


class PatchFeatures(nn.Module):
    """The tokens of a backbone's patches behind `depth` blocks, side by side: images `(b c h w)` → `(b patches·d)`.

    Each number is standardised by its mean and standard deviation over up to `samples` images of `split`, chosen by its
    classes as evenly as they can be had and by `seed`; no other use is made of labels. An embedding, and a pooled feature,
    keeps what tells the classes it was trained on apart; for other images the first blocks' tokens in their places tell
    more, among cosine neighbours above all.

    Raises `UsageError` for a backbone without a `vit`, an empty split and a depth that the `vit` has not.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, split: ImageSplit, *, depth: int = 1, samples: int = 5000, seed: int = 0) -> None:
        super().__init__()
        if not hasattr(backbone, "vit"):
            raise UsageError(f"{type(backbone).__name__} has no vit whose patches could be taken; give a 'vae_encoder'")
        if len(split) == 0:
            raise UsageError("the split to standardise by holds no images")
        self.backbone, self.depth = backbone, depth
        with evaluating(backbone) as device:
            batches = split.take(samples, seed=seed).batches(500).epoch(0, device=device)
            found = torch.cat([self._tokens(batch["images"]) for batch in batches])
        self.register_buffer("mean", found.mean(dim=0).clone())
        self.register_buffer("std", found.std(dim=0, correction=0).clamp(min=1e-3))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → features float32 `(b patches·d)`."""
        return (self._tokens(images) - self.mean) / self.std

    def _tokens(self, images: Tensor) -> Tensor:
        vit = self.backbone.vit
        (tokens,) = vit.forward_features(images, [self.depth])
        found: Tensor = tokens[:, vit.num_prefix_tokens :].flatten(1).float()
        return found
