"""The multimodal JEPA: a backbone, a projector and a loss, trained on views of images and their labels."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitkit.distributed import all_gather, draw_rows, rank, world_size
from vitkit.errors import UsageError
from vitkit.training import GradCacheable

Objective = Literal["joint", "seed", "images"]


class JEPA(GradCacheable):
    """Views of a sample → one embedding: batches of images and labels → {"loss", "invariance", "sigreg"}.

    A batch is `images` `(b v c h w)`, v augmented views of each, or `(b c h w)`, and `labels` int64 `(b,)`,
    where −1 hides a sample's label. `objective` says over which views an embedding is asked to agree:

    - "joint": the first v − 1 images alone (one image serves as both), the last image with a label, and the
      label alone. A share `swap` of the images are told a wrong label k in place of their own y. Such a view
      stands for what the image would be as a k: z(image, k) − ℓ_k + ℓ_y is what must agree with the other
      views, where ℓ are the labels' own projections, held fixed there. So the label is what a view with a
      label gets its class from, and an image agrees with itself under its own label alone.
    - "seed": every image with its own label.
    - "images": every image alone: the baseline without labels. The backbone's label embedding is frozen.

    Each view shows a share `keep` of its patches, drawn anew for each image (as in FLIP, Li et al., arXiv 2212.00794): a step
    costs about that share, and views have less in common. Evaluators show all.

    A hidden label's token names no class, and its sample has no view of the label alone. SIGReg looks at all
    views but that one, which has as many values as there are classes and cannot be Gaussian.

    Ranks: the loss is the whole batch's, see the loss; every trainable parameter takes part on every rank
    whichever labels it sees. Swaps and patches are drawn from rank 0's global generator of torch for the whole
    batch, so that any number of ranks gives what one process gives; dropout and stochastic depth, where the
    backbone has them, are drawn by each rank.

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

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each sample brings by itself: `features` `(b v d)` of its views and, with "joint", `labels` and `told`."""
        images, labels = batch["images"], batch["labels"]
        images = images[:, None] if images.ndim == 4 else images
        if images.ndim != 5 or labels.shape != images.shape[:1]:
            raise UsageError(
                f"images are {tuple(images.shape)} and labels {tuple(labels.shape)}, "
                f"expected (batch, views, channels, height, width) and (batch,)"
            )
        views, rows = images.shape[1], images.transpose(0, 1).flatten(0, 1)  # (v·b c h w)
        if self.objective == "joint":
            return self._embed_joint(rows, labels, max(views - 1, 1))
        keep = self._kept(labels, views)
        if self.objective == "seed":
            features = self.backbone.encode_multimodal(rows, labels.repeat(views), keep=keep)
        else:
            features = self.backbone.encode_image(rows, keep=keep)
        return {"features": features.unflatten(0, (views, len(labels))).transpose(0, 1)}

    def compute_loss(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts of the embeddings of a batch, or of several parts of one, put together."""
        features = embedded["features"].transpose(0, 1)  # (v b d)
        if self.objective == "joint":
            return self._joint(features, embedded["labels"], embedded["told"])
        return dict(self.loss(self.projector(features)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`, which probes are trained on."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def _embed_joint(self, rows: Tensor, labels: Tensor, alone: int) -> dict[str, Tensor]:
        """`rows` (v·b c h w), of which the first `alone`·b are seen without a label, and the last b with one."""
        self.backbone.check_labels(labels)
        batch, told, keep = len(labels), self._tell(labels.clamp(min=0)), self._kept(labels, alone + 1)
        shown = torch.where(labels >= 0, told, labels)
        apart, beside = (None, None) if keep is None else keep.split([alone * batch, batch])
        features = [
            self.backbone.encode_image(rows[: alone * batch], keep=apart),
            self.backbone.encode_multimodal(rows[len(rows) - batch :], shown, keep=beside),
        ]
        views = torch.cat(features).unflatten(0, (alone + 1, batch))  # (v b d)
        return {"features": views.transpose(0, 1), "labels": labels, "told": told}

    def _joint(self, features: Tensor, labels: Tensor, told: Tensor) -> dict[str, Tensor]:
        views, batch = features.shape[:2]
        shown, own = labels >= 0, labels.clamp(min=0)
        # Each class once, over all ranks: a batch norm would otherwise see it as often as there are ranks.
        classes = torch.arange(self.backbone.num_classes, device=features.device).tensor_split(world_size())[rank()]
        label_features = self.backbone.encode_label(classes)
        projected = self.projector(torch.cat([features.flatten(0, 1), label_features])).float()
        z, points = projected.split([views * batch, len(classes)])
        points = all_gather(points)
        moved = torch.where(shown[:, None], points[told] - points[own], 0.0).detach()
        z = z.unflatten(0, (views, batch))
        projections = torch.cat([z[:-1], (z[-1] - moved)[None], points[own][None]])
        present = shown.repeat(views + 1, 1)
        present[:-1] = True
        return dict(self.loss(projections, present=present, regularised=-1))

    def _tell(self, labels: Tensor) -> Tensor:
        """The labels `(b,)`, a share `swap` of them replaced by others, drawn evenly."""
        classes, device = self.backbone.num_classes, labels.device
        steps = draw_rows(lambda n: torch.randint(1, max(classes, 2), (n,), device=device), labels)
        swapped = draw_rows(lambda n: torch.rand(n, device=device), labels) < self.swap
        return torch.where(swapped, (labels + steps) % classes, labels)

    def _kept(self, labels: Tensor, views: int) -> Tensor | None:
        """The patches `(v·b k)` that the views show, drawn for each; None for all."""
        patches = self.backbone.num_patches
        count = max(1, round(self.keep * patches))
        if count == patches:
            return None
        drawn = draw_rows(lambda n: torch.rand(n, views, patches, device=labels.device), labels)
        return drawn.argsort(dim=-1)[..., :count].transpose(0, 1).flatten(0, 1)
