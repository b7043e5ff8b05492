"""CLIP over pairs: an image tower, a text tower, two projectors and a loss."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.training import GradCacheable

CAPTIONS_AT_ONCE = 500


class CLIP(GradCacheable):
    """Images and captions in one space: batches of pairs (see `Pairs`) → {"loss", parts}.

    The embedding of an image is `projector(backbone.encode_image(images))`. The embedding of a caption is
    `text_projector(text.encode_text(...))`; `captions[i]` is caption number i. Each distinct caption of a batch is encoded
    once. If the text tower has no trainable parameters, its features of all captions are computed once and cached.

    With a `classifier`, a head `(b d)` → `(b k)` that both halves share, the loss also takes `logits` `(b 2 k)` and `classes`
    `(b 2)` (`pair_multi_task`); the backbone then offers `encode_halves` and `join`.

    Pairs of a batch with the same caption are positives of each other with `caption_positives`, and negatives without it.

    Raises `UsageError` if a label is not the number of a caption.

    Source: Radford et al., arXiv 2103.00020.
    """

    def __init__(
        self,
        backbone: Any,
        text: Any,
        projector: nn.Module,
        text_projector: nn.Module,
        loss: nn.Module,
        captions: Sequence[str],
        classifier: nn.Module | None = None,
        *,
        caption_positives: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.text, self.loss = backbone, text, loss
        self.projector, self.text_projector, self.half_classifier = projector, text_projector, classifier
        self.captions = list(captions)
        self.caption_positives = caption_positives
        self.frozen = not any(parameter.requires_grad for parameter in text.parameters())
        self._caption_features: Tensor | None = None

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The loss's values for embeddings that are all the same; empty if the loss does not give them."""
        stated = getattr(self.loss, "uninformed", None)
        if stated is None:
            return {}
        if self.half_classifier is None:
            return dict(stated(batch_size))
        return dict(stated(batch_size, num_classes=math.isqrt(len(self.captions))))

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features of each pair: embeddings `image` and `text` `(b d)`, `labels`, and with a classifier `logits`
        `(b 2 k)` and `classes` `(b 2)`.
        """
        image, *logits = self.embed_images(batch["images"])
        features = {"image": image, "text": self.embed_labels(batch["labels"]), "labels": batch["labels"]}
        if logits:
            features |= {"logits": logits[0], "classes": torch.stack([batch["left"], batch["right"]], dim=1)}
        return features

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts from the features of one batch, or of several joined batches."""
        labels = features["labels"] if self.caption_positives else None
        if self.half_classifier is None:
            return dict(self.loss(features["image"], features["text"], labels=labels))
        return dict(self.loss(features["image"], features["text"], labels, features["logits"], features["classes"]))

    def encode_image(self, images: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → the backbone's features `(b d)`."""
        return self.backbone.encode_image(images)

    def embed_images(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pairs `(b c h 2w)` → embeddings `(b d)`, and with a classifier the logits of both halves `(b 2 k)`."""
        if self.half_classifier is None:
            return (self.projector(self.backbone.encode_image(images)),)
        halves = self.backbone.encode_halves(images)
        return self.projector(self.backbone.join(halves)), self.half_classifier(halves)

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Captions by number `(b,)` → embeddings `(b d)`."""
        numbers, inverse = labels.unique(return_inverse=True)
        return self.embed_captions(numbers)[inverse]

    def embed_captions(self, numbers: Tensor) -> Tensor:
        """Distinct captions by number `(m,)` → embeddings `(m d)`."""
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.captions):
            raise UsageError(
                f"labels run from {int(numbers.min())} to {int(numbers.max())}; there are {len(self.captions)} captions"
            )
        if self.frozen:
            return self.text_projector(self._frozen_features(numbers.device)[numbers])
        return self.text_projector(self.text.encode_text([self.captions[number] for number in numbers.tolist()]))

    def _frozen_features(self, device: torch.device) -> Tensor:
        """The frozen text tower's features of every caption `(k² d)`."""
        if self._caption_features is None or self._caption_features.device != device:
            starts = range(0, len(self.captions), CAPTIONS_AT_ONCE)
            with torch.no_grad():
                parts = [self.text.encode_text(self.captions[i : i + CAPTIONS_AT_ONCE]) for i in starts]
            self._caption_features = torch.cat(parts).float().to(device)
        return self._caption_features
