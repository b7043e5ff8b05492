"""CLIP over pairs: an image tower, a text tower, two projectors and a loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.training import GradCacheable


class CLIP(GradCacheable):
    """Batches of pairs (see `Pairs`) → {"loss", parts}: what is seen and what is said of it meet in one space.

    An image's embedding is `projector(backbone.encode_image(images))`, a caption's `text_projector(text.encode_text(...))`;
    `captions[i]` is caption number i. Each distinct caption of what is embedded together is encoded once. What a
    text tower without trainable parameters says of the captions is computed once, when first asked for, and kept.

    With a `classifier`, a head `(b d)` → `(b k)` that both halves share, the loss is given `logits` `(b 2 k)` and `classes`
    `(b 2)` as well (`pair_multi_task`); the backbone then offers `encode_halves` and `join`.

    With `caption_positives` the pairs of a batch that have the same caption are each other's positives, otherwise negatives.

    Raises `UsageError` for a label that is no caption's number.

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
        self.projector, self.text_projector, self.classifier = projector, text_projector, classifier
        self.captions = list(captions)
        self.caption_positives = caption_positives
        self.frozen = not any(parameter.requires_grad for parameter in text.parameters())
        self._kept: Tensor | None = None

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each pair brings by itself: embeddings `image` and `text` `(b d)`, `labels`, and with a classifier `logits`
        `(b 2 k)` and `classes` `(b 2)`.
        """
        seen = self.embed_images(batch["images"])
        found = {"image": seen[0], "text": self.embed_labels(batch["labels"]), "labels": batch["labels"]}
        if self.classifier is None:
            return found
        return {**found, "logits": seen[1], "classes": torch.stack([batch["left"], batch["right"]], dim=1)}

    def compute_loss(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts of the embeddings of a batch, or of several parts of one, put together."""
        labels = embedded["labels"] if self.caption_positives else None
        if self.classifier is None:
            return dict(self.loss(embedded["image"], embedded["text"], labels=labels))
        return dict(self.loss(embedded["image"], embedded["text"], labels, embedded["logits"], embedded["classes"]))

    def encode_image(self, images: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → the backbone's features `(b d)`."""
        return self.backbone.encode_image(images)

    def embed_images(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pairs `(b c h 2w)` → embeddings `(b d)`, and with a classifier the logits of both halves `(b 2 k)`."""
        if self.classifier is None:
            return (self.projector(self.backbone.encode_image(images)),)
        halves = self.backbone.encode_halves(images)
        return self.projector(self.backbone.join(halves)), self.classifier(halves)

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
            return self.text_projector(self._said(numbers.device)[numbers])
        return self.text_projector(self.text.encode_text([self.captions[number] for number in numbers.tolist()]))

    def _said(self, device: torch.device) -> Tensor:
        """What the frozen text tower says of every caption `(k² d)`."""
        if self._kept is None or self._kept.device != device:
            with torch.no_grad():
                parts = [self.text.encode_text(self.captions[i : i + 500]) for i in range(0, len(self.captions), 500)]
            self._kept = torch.cat(parts).float().to(device)
        return self._kept
