"""The multimodal JEPA: a backbone, a projector and a loss, trained on views of images and their labels."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError

Objective = Literal["joint", "seed", "images"]


class JEPA(nn.Module):
    """Views of a sample → one embedding: batches of images and labels → {"loss", "invariance", "sigreg"}.

    A batch is `images` `(b v c h w)`, v augmented views of each, or `(b c h w)`, and `labels` int64 `(b,)`,
    where −1 hides a sample's label. `objective` says over which views an embedding is asked to agree:

    - "joint": the first v − 1 images alone (one image serves as both), the last image with a label, and the
      label alone. A share `swap` of the images are told a wrong label k in place of their own y. Such a view
      stands for what the image would be as a k: z(image, k) − ℓ_k + ℓ_y is what must agree with the other
      views, where ℓ are the labels' own projections, held fixed there. So the label is what a view with a
      label gets its class from, and an image agrees with itself under its own label alone. The view is shown
      a share `keep` of its patches.
    - "seed": every image with its own label, all patches.
    - "images": every image alone: the baseline without labels. The backbone's label embedding is frozen.

    A hidden label's token names no class, and its sample has no view of the label alone. SIGReg looks at all
    views but that one, which has as many values as there are classes and cannot be Gaussian.

    Ranks: the loss is the whole batch's, see the loss; every trainable parameter takes part on every rank
    whichever labels it sees. Swaps and patches are drawn from torch's global generator.

    Raises `UsageError` for an unknown objective, `swap` outside [0, 1], `keep` outside (0, 1], images and
    labels that do not fit, and labels outside the backbone's classes.
    """

    def __init__(
        self,
        backbone: Any,
        projector: nn.Module,
        loss: nn.Module,
        *,
        objective: Objective = "joint",
        swap: float = 0.5,
        keep: float = 1.0,
    ) -> None:
        super().__init__()
        known = get_args(Objective)
        if objective not in known:
            raise UsageError(f"objective is {objective!r}, expected {', '.join(map(repr, known))}")
        if not 0.0 <= swap <= 1.0:
            raise UsageError(f"swap is {swap}, expected a share of the labels in [0, 1]")
        if not 0.0 < keep <= 1.0:
            raise UsageError(f"keep is {keep}, expected a share of the patches in (0, 1]")
        self.backbone, self.projector, self.loss = backbone, projector, loss
        self.objective, self.swap, self.keep = objective, swap, keep
        if objective == "images":
            # It takes no part in the loss: weight decay would still move it, and DDP would wait for its gradient.
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
        views, rows = images.shape[1], images.transpose(0, 1).flatten(0, 1)  # (v·b c h w)
        if self.objective == "joint":
            return self._joint(rows, labels)
        if self.objective == "seed":
            features = self.backbone.encode_multimodal(rows, labels.repeat(views))
        else:
            features = self.backbone.encode_image(rows)
        return dict(self.loss(self.projector(features).unflatten(0, (views, -1))))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`, which probes are trained on."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def _joint(self, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.backbone.check_labels(labels)
        batch, classes = len(labels), self.backbone.num_classes
        alone = rows[: max(len(rows) - batch, batch)]
        shown, own = labels >= 0, labels.clamp(min=0)
        told = self._tell(own)
        parts = [
            self.backbone.encode_image(alone),
            self._encode_last(rows[-batch:], torch.where(shown, told, labels)),
            self.backbone.encode_label(torch.arange(classes, device=rows.device)),  # each class once
        ]
        z, z_told, points = self.projector(torch.cat(parts)).float().split([len(alone), batch, classes])
        moved = torch.where(shown[:, None], points[told] - points[own], 0.0).detach()
        projections = torch.cat([z, z_told - moved, points[own]]).unflatten(0, (-1, batch))
        present = shown.repeat(len(projections), 1)
        present[:-1] = True
        return dict(self.loss(projections, present=present, regularised=-1))

    def _tell(self, labels: Tensor) -> Tensor:
        """The labels `(b,)`, a share `swap` of them replaced by others, drawn evenly."""
        classes = self.backbone.num_classes
        others = (labels + torch.randint_like(labels, 1, max(classes, 2))) % classes
        return torch.where(torch.rand(labels.shape, device=labels.device) < self.swap, others, labels)

    def _encode_last(self, images: Tensor, labels: Tensor) -> Tensor:
        patches = self.backbone.num_patches
        count = max(1, round(self.keep * patches))
        keep = None
        if count < patches:
            keep = torch.rand(len(images), patches, device=images.device).argsort(dim=1)[:, :count]
        features: Tensor = self.backbone.encode_multimodal(images, labels, keep=keep)
        return features
