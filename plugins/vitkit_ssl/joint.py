"""Joint embeddings: the projections of an image's views are compared by one loss. SimCLR and LeJEPA differ in the loss alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.contracts import UNLABELLED
from vitkit.distributed import all_reduce_sum
from vitkit.errors import UsageError
from vitkit.training import GradCacheable
from vitkit_ssl.masking import encode_views


class JointEmbedding(GradCacheable):
    """Batches with `views` → the parts of `loss(projections)`: projections `(v b d)` of all views of each image.

    With the loss `nt_xent` this is SimCLR (arXiv 2002.05709), with `lejepa` it is LeJEPA (arXiv 2511.08544). Each view of the first kind
    uses a share `keep` of its patches.

    Ranks: as the loss's; patches are drawn for the samples of all ranks.
    """

    def __init__(self, backbone: Any, projector: nn.Module, loss: nn.Module, *, keep: float = 1.0) -> None:
        super().__init__()
        self.backbone, self.projector, self.loss, self.keep = backbone, projector, loss, keep

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The loss's values for a network that knows nothing, of two views; empty if the loss does not give them."""
        values_of = getattr(self.loss, "uninformed", None)
        return {} if values_of is None else dict(values_of(batch_size))

    def forward_features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The features of each sample's views, `features` `(b v d)`."""
        crops, *more = batch["views"]
        features = [encode_views(self.backbone, crops, self.keep), *(encode_views(self.backbone, views) for views in more)]
        return {"features": torch.cat(features, dim=1)}

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the features of one batch, or of several joined batches."""
        return dict(self.loss(self.projector(features["features"].transpose(0, 1))))


class Supervised(GradCacheable):
    """Batches with `views` and labels → {"loss"}: the cross entropy of a linear classifier, the reference for methods without labels.

    Images without a label do not count. Ranks: the loss is the mean over the labelled views of all ranks.
    """

    def __init__(self, backbone: Any, classifier: nn.Module, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.backbone, self.classifier, self.label_smoothing = backbone, classifier, label_smoothing

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → the backbone's features `(b d)`."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def forward_features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The features of each sample's views `(b v d)`, and its label."""
        return {"features": encode_views(self.backbone, batch["views"][0]), "labels": batch["labels"]}

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the features of one batch, or of several joined batches."""
        logits = self.classifier(features["features"]).float()  # (b v k)
        labels = features["labels"][:, None].expand(logits.shape[:2]).flatten()
        if logits.shape[-1] < 2:
            raise UsageError("a classifier needs two classes or more, and these images have no labels; take another --method")
        with torch.autocast(logits.device.type, enabled=False):
            total = F.cross_entropy(
                logits.flatten(0, 1), labels, ignore_index=UNLABELLED, label_smoothing=self.label_smoothing, reduction="sum"
            )
            count = all_reduce_sum((labels != UNLABELLED).sum().to(total.dtype))
            return {"loss": all_reduce_sum(total) / count.clamp(min=1)}


__all__ = ["JointEmbedding", "Supervised"]
