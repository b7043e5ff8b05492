"""The multimodal JEPA: a backbone, a projector and a loss, trained on views of images and their labels."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitkit.distributed import all_gather, draw_rows, rank, world_size
from vitkit.errors import UsageError
from vitkit.training import GradCacheable
from vitkit.validation import in_range, one_of

Objective = Literal["joint", "reference", "images"]


class JEPA(GradCacheable):
    """Views of a sample share one embedding: batches of images and labels → {"loss", "invariance", "sigreg"}.

    A batch is `images` `(b v c h w)`, v augmented views of each, or `(b c h w)`, and `labels` int64 `(b,)`,
    −1 (`UNLABELLED`) where a sample has no label. `objective` names the views whose embeddings agree:

    - "joint": the first v − 1 images without a label (one image serves as both), the last image with a label, and the
      label without an image. For a share `swap` of the images the label is a wrong one, k in place of the image's y. Such a view
      stands for the image as a member of class k: z(image, k) − ℓ_k + ℓ_y agrees with the other
      views, where ℓ are the labels' projections, without gradient there. So a view with a label takes its class from
      the label, and an image agrees with itself only under its true label.
    - "reference": every image with its true label, as in the reference document.
    - "images": every image without a label, the baseline. The backbone's label embedding is frozen.

    Each view uses a share `keep` of its patches, drawn per image and step (as in FLIP, Li et al., arXiv 2212.00794). The
    cost of a step falls to about this share, and views have less in common. Evaluators use all patches.

    A sample without a label has no view of the label alone, and its view with a label uses a token that names no class.
    SIGReg leaves out the view of the label alone: it has only one value per class and cannot be Gaussian.

    Ranks: the loss is that of the whole batch. Every trainable parameter takes part on every rank, also if the rank has no
    labels. Swaps and patches are drawn for the whole batch from torch's global generator on rank 0, so that any number of
    ranks gives the result of one process. Each rank draws its own dropout and stochastic depth.

    Raises `UsageError` if the objective is unknown, `swap` is outside [0, 1], `keep` is outside (0, 1], the shapes of
    images and labels do not fit, or a label is not a class of the backbone.
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
        one_of(get_args(Objective), objective=objective)
        in_range(0, 1, swap=swap)
        in_range(0, 1, low_included=False, keep=keep)
        self.backbone, self.projector, self.loss = backbone, projector, loss
        self.objective, self.swap, self.keep = objective, swap, keep
        if (objective != "images" or keep < 1) and hasattr(backbone, "check_takes_labels"):
            backbone.check_takes_labels()
        if objective == "images":
            # The loss does not use it: weight decay would still change it, and DDP would wait for its gradient.
            backbone.label_embed.requires_grad_(False)
            backbone.label_type.requires_grad_(False)

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The loss and its parts for embeddings that are all zero; empty if the loss does not give them."""
        values_of = getattr(self.loss, "uninformed", None)
        return {} if values_of is None else values_of(batch_size)

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features of each sample: `features` `(b v d)` of its views and, with "joint", `labels` and `given_labels`."""
        images, labels = batch["images"], batch["labels"]
        images = images[:, None] if images.ndim == 4 else images
        if images.ndim != 5 or labels.shape != images.shape[:1]:
            raise UsageError(
                f"images are {tuple(images.shape)} and labels {tuple(labels.shape)}; "
                f"expected (batch, views, channels, height, width) and (batch,)"
            )
        views, rows = images.shape[1], images.transpose(0, 1).flatten(0, 1)  # (v·b c h w)
        if self.objective == "joint":
            return self._joint_features(rows, labels, max(views - 1, 1))
        keep = self._drawn_patches(labels, views)
        if self.objective == "reference":
            features = self.backbone.encode_multimodal(rows, labels.repeat(views), keep=keep)
        else:
            features = self.backbone.encode_image(rows, keep=keep)
        return {"features": features.unflatten(0, (views, len(labels))).transpose(0, 1)}

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts from the features of one batch, or of several joined batches."""
        views = features["features"].transpose(0, 1)  # (v b d)
        if self.objective == "joint":
            return self._joint_loss(views, features["labels"], features["given_labels"])
        return dict(self.loss(self.projector(views)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`, on which probes are trained."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def _joint_features(self, rows: Tensor, labels: Tensor, image_views: int) -> dict[str, Tensor]:
        """`rows` (v·b c h w): the first `image_views`·b are encoded without a label, the last b with one."""
        self.backbone.check_labels(labels)
        batch, keep = len(labels), self._drawn_patches(labels, image_views + 1)
        given_labels = self._swapped(labels.clamp(min=0))
        label_input = torch.where(labels >= 0, given_labels, labels)
        keep_alone, keep_labelled = (None, None) if keep is None else keep.split([image_views * batch, batch])
        features = [
            self.backbone.encode_image(rows[: image_views * batch], keep=keep_alone),
            self.backbone.encode_multimodal(rows[len(rows) - batch :], label_input, keep=keep_labelled),
        ]
        views = torch.cat(features).unflatten(0, (image_views + 1, batch))  # (v b d)
        return {"features": views.transpose(0, 1), "labels": labels, "given_labels": given_labels}

    def _joint_loss(self, features: Tensor, labels: Tensor, given_labels: Tensor) -> dict[str, Tensor]:
        views, batch = features.shape[:2]
        labelled, true_labels = labels >= 0, labels.clamp(min=0)
        # Each class is encoded on one rank only; otherwise a batch norm would count it once for each rank.
        classes = torch.arange(self.backbone.num_classes, device=features.device).tensor_split(world_size())[rank()]
        label_features = self.backbone.encode_label(classes)
        projected = self.projector(torch.cat([features.flatten(0, 1), label_features])).float()
        z, label_points = projected.split([views * batch, len(classes)])
        label_points = all_gather(label_points)
        shift = label_points[given_labels] - label_points[true_labels]
        shift = torch.where(labelled[:, None], shift, 0.0).detach()
        z = z.unflatten(0, (views, batch))
        projections = torch.cat([z[:-1], (z[-1] - shift)[None], label_points[true_labels][None]])
        present = labelled.repeat(views + 1, 1)
        present[:-1] = True
        return dict(self.loss(projections, present=present, regularised=-1))

    def _swapped(self, labels: Tensor) -> Tensor:
        """The labels `(b,)`, of which a share `swap` is replaced by other classes, drawn with equal probability."""
        classes, device = self.backbone.num_classes, labels.device
        steps = draw_rows(lambda n: torch.randint(1, max(classes, 2), (n,), device=device), labels)
        swapped = draw_rows(lambda n: torch.rand(n, device=device), labels) < self.swap
        return torch.where(swapped, (labels + steps) % classes, labels)

    def _drawn_patches(self, labels: Tensor, views: int) -> Tensor | None:
        """The patches `(v·b k)` that the views use, drawn for each; None for all."""
        patches = self.backbone.num_patches
        count = max(1, round(self.keep * patches))
        if count == patches:
            return None
        drawn = draw_rows(lambda n: torch.rand(n, views, patches, device=labels.device), labels)
        return drawn.argsort(dim=-1)[..., :count].transpose(0, 1).flatten(0, 1)
