"""Features of a frozen encoder for images of another dataset than that of the training."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit import backbones
from vitkit.contracts import Scores, SplitName
from vitkit.data import ImageSplit
from vitkit.errors import UsageError
from vitkit.models import evaluating
from vitkit.validation import at_least, one_of
from vitkit_eval import Transfer, adapted


class PatchFeatures(nn.Module):
    """The whitened tokens of a backbone's patches after `depth` blocks: images `(b c h w)` → `(b components)`.

    t = concatenated standardised tokens `(b patches·d)`; the feature is t·V/√λ with the `components` eigenvectors V of t's
    covariance that have the largest eigenvalues λ (fewer if there are fewer dimensions or images). Means, standard
    deviations and covariance are those of up to `samples` images of `split`, chosen by `seed` in equal shares per class as
    far as possible. Labels have no other use.

    Embeddings and pooled features keep mainly the differences between the classes of the training; for other images the tokens
    of the first blocks hold more information. Without whitening, a few directions in which all images vary would dominate the
    cosines between neighbours.

    Raises `UsageError` if the backbone has no `vit`, the split has fewer than two images, `components` is below 1, or the
    `vit` does not have this depth.
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
            raise UsageError(f"{type(backbone).__name__} has no vit, whose patches are the features; give a 'vae_encoder'")
        if len(split) < 2:
            raise UsageError(f"the split for the whitening holds {len(split)} images; expected at least 2")
        at_least(1, components=components)
        self.backbone, self.depth = backbone, depth
        with evaluating(backbone) as device:
            batches = split.stratified_subset(samples, seed=seed).batches(500).epoch(0, device=device)
            tokens = torch.cat([self._tokens(batch["images"]) for batch in batches])
        self.register_buffer("mean", tokens.mean(dim=0).clone())
        self.register_buffer("std", tokens.std(dim=0, correction=0).clamp(min=1e-3))
        standard = (tokens - self.mean) / self.std
        with torch.autocast(tokens.device.type, enabled=False):  # small eigenvalues are lost in half precision
            values, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))  # ascending
        kept = min(components, len(tokens) - 1, len(values))
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
        patches: Tensor = tokens[:, vit.num_prefix_tokens :].flatten(1).float()
        return patches


class PatchTransfer(Transfer):
    """`transfer` with `PatchFeatures` of the model's backbone, fitted to the other dataset's training images.

    `features` "patches": whitened tokens after the first block; "embedding": the model's own `encode_image`, as in
    `transfer`. Metrics, other arguments, ranks and errors are those of `transfer`. It also raises `UsageError` if the
    backbone has no `vit`.
    """

    name = "patch_transfer"

    def __init__(
        self,
        *,
        dataset: str = "digits",
        features: Literal["patches", "embedding"] = "patches",
        k: int = 20,
        C: float = 1.0,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
    ) -> None:
        one_of(("patches", "embedding"), features=features)
        super().__init__(dataset=dataset, k=k, C=C, train_size=train_size, test_size=test_size, seed=seed)
        self.features = features

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = nn.Module()
        model.backbone = backbones.build("vitkit:vae_encoder", img_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=1)
        return {"train_size": 60, "test_size": 30}, {"model": model}

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        if self.features == "embedding":
            return super().__call__(model, dataset, split)
        fitted = PatchFeatures(model.backbone, adapted(self.dataset.train, dataset.train.preprocessing))
        return super().__call__(fitted, dataset, split)
