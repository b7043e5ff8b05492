"""The multimodal JEPA: a backbone, a projector and a loss, trained on views of images and their labels."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError

Objective = Literal["joint", "seed", "images"]


class JEPA(nn.Module):
    """Views of a sample → one embedding: batches of images and labels → {"loss", "invariance", "sigreg"}.

    A batch is `images` `(b v c h w)`, v augmented views of each, or `(b c h w)`, and `labels` int64 `(b,)`,
    where −1 hides a sample's label. `objective` says which views an embedding is asked to agree over:

    - "joint": each image alone; the last `fused` images, a share `keep` of their patches drawn anew, with the
      label; and the label alone. The few patches leave it to the label to say the class, and cost less. A
      sample whose label is hidden has the first kind only.
    - "seed": each image with the label, all patches. A hidden label's token names no class.
    - "images": each image alone: the baseline. The backbone's label embedding is frozen, and stays what it
      was.

    SIGReg looks at all but the label alone, which has as many values as there are classes and cannot be
    Gaussian.

    Ranks: the loss is the whole batch's, see the loss; every parameter takes part on every rank, whichever
    labels it sees. Raises `UsageError` for an unknown objective, `keep` outside (0, 1], `fused` below one,
    images and labels that do not fit, and labels outside the backbone's classes.
    """

    def __init__(
        self,
        backbone: Any,
        projector: nn.Module,
        loss: nn.Module,
        *,
        objective: Objective = "joint",
        keep: float = 0.5,
        fused: int = 1,
    ) -> None:
        super().__init__()
        if objective not in get_args(Objective):
            raise UsageError(f"objective is {objective!r}, expected {', '.join(map(repr, get_args(Objective)))}")
        if not 0.0 < keep <= 1.0:
            raise UsageError(f"keep is {keep}, expected a share of the patches in (0, 1]")
        if fused < 1:
            raise UsageError(f"fused is {fused}, expected at least 1 view with the label")
        self.backbone, self.projector, self.loss = backbone, projector, loss
        self.objective, self.keep, self.fused = objective, keep, fused
        if objective == "images":
            backbone.label_embed.requires_grad_(False)
            backbone.label_type.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, labels = batch["images"], batch["labels"]
        images = images[:, None] if images.ndim == 4 else images
        if images.ndim != 5 or labels.shape != images.shape[:1]:
            raise UsageError(
                f"images are {tuple(images.shape)} and labels {tuple(labels.shape)}, "
                f"expected (batch, views, channels, height, width) and (batch,)"
            )
        views = images.transpose(0, 1)  # (v b c h w)
        if self.objective == "images":
            return dict(self.loss(self._project([self._images(views)])))
        if self.objective == "seed":
            return dict(self.loss(self._project([self._fused(views, labels, None)])))
        fused = views[-self.fused :]
        parts = [self._images(views), self._fused(fused, labels, self._draw(fused)), self._labels(labels)[None]]
        present = (labels >= 0).repeat(len(views) + len(fused) + 1, 1)
        present[: len(views)] = True
        return dict(self.loss(self._project(parts), present=present, regularised=len(present) - 1))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`, which probes are trained on."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def _images(self, views: Tensor) -> Tensor:
        """Views `(v b c h w)` → features `(v b d)`, all in one pass."""
        return self.backbone.encode_image(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    def _fused(self, views: Tensor, labels: Tensor, keep: Tensor | None) -> Tensor:
        features = self.backbone.encode_multimodal(views.flatten(0, 1), labels.repeat(len(views)), keep=keep)
        return features.unflatten(0, views.shape[:2])

    def _labels(self, labels: Tensor) -> Tensor:
        """Labels `(b,)` → features `(b d)`, each class computed once."""
        return self.backbone.encode_label(torch.arange(self.backbone.num_classes, device=labels.device))[labels.clamp(min=0)]

    def _draw(self, views: Tensor) -> Tensor | None:
        """Indices `(v·b k)` of the patches to keep, drawn evenly without replacement; None for all."""
        patches = self.backbone.num_patches
        count = max(1, round(self.keep * patches))
        if count == patches:
            return None
        noise = torch.rand(views.shape[0] * views.shape[1], patches, device=views.device)
        return noise.argsort(dim=1)[:, :count]

    def _project(self, parts: list[Tensor]) -> Tensor:
        return self.projector(torch.cat(parts))
