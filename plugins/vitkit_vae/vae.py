"""The multi-task variational autoencoder: embed, classify, reconstruct."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import heads
from vitkit.contracts import UNLABELLED
from vitkit.distributed import all_reduce_sum, rank
from vitkit.errors import UsageError
from vitkit.registry import Component
from vitkit.training import GradCacheable
from vitkit_vae.elbo import KLLoss, ReconstructionLoss
from vitkit_vae.encoder import build_encoder, sample_latent
from vitkit_vae.triplet import TripletLoss
from vitkit_vae.weighting import MultiTaskLoss

CLASSIFIER_WIDTH = 128


class MultiTaskVAE(GradCacheable):
    """Batches of images and labels → {"loss", "classification", "triplet", "reconstruction", "kl"}, see each loss.

    The backbone maps images to μ and σ²; z = μ + σ·ε is embedded, the embedding is classified, and the decoder maps z to an
    image. Parts that `loss` weighs with 0, or whose `classifier` or `decoder` is not given, are not computed. `mean` and
    `std` are those of the normalisation of images: reconstructions are compared with pixels in [0, 1]. Losses that are not
    given are means over pixels and over dimensions of the latent; the default weights fit these means. A batch is one of

    - `images` `(b c h w)` and `labels` int64 `(b,)`, −1 (`UNLABELLED`) for none: one pass; triplets are mined among its images.
    - `images` `(b v c h w)`: v views of each, all in one pass. The first is the anchor. With `supervised`, images with the
      same label form a class. Without it, the views of one image form a class and labels are ignored.
    - with `positives` and `negatives` `(b c h w)` beside `images`: three passes, each with gradient; see `TripletBatches`.
    - with `partners` int64 `(b,)` and `weights` `(b,)` of mixed images: in the cross-entropy label i counts `weights[i]`, its
      partner 1 − `weights[i]`; a triplet takes the heavier of the two; a conditional decoder gets no class for a mixture.

    Only anchors are reconstructed and have a KL term. Every view is classified. Positives and negatives are only embedded.
    A decoder with `num_classes` gets the labels.

    Ranks: every part of the loss is the mean over the whole batch and equal on every rank; the ranks' parts of the batch
    may differ in size. Gradients follow `vitkit.distributed.collectives`. ε is also drawn for the whole batch. With
    gradient accumulation (see `vitkit.training.gradcache`) triplets are mined among all accumulated images, and the
    classifier sees all their embeddings.

    Raises `UsageError` if no weighted part is left, for a classifier without `supervised`, for a triplet loss without
    labels on single views, and for shapes that do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Any,
        classifier: nn.Module | None = None,
        decoder: Any = None,
        *,
        loss: MultiTaskLoss | None = None,
        triplet: TripletLoss | None = None,
        reconstruction: ReconstructionLoss | None = None,
        kl: KLLoss | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        num_classes: int | None = None,
        supervised: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone, self.classifier, self.decoder = backbone, classifier, decoder
        self.loss = MultiTaskLoss() if loss is None else loss
        self.triplet = TripletLoss() if triplet is None else triplet
        self.reconstruction = ReconstructionLoss() if reconstruction is None else reconstruction
        self.kl = KLLoss(reduction="dimension") if kl is None else kl
        self.num_classes, self.supervised, self.label_smoothing = num_classes, supervised, label_smoothing
        self.parts = set(self.loss.used)
        for part, module in (("classification", classifier), ("reconstruction", decoder)):
            if module is None:
                self.parts.discard(part)
        if not supervised and "classification" in self.parts:
            raise UsageError("a classifier needs labels: leave it out, or give supervised=True")
        if not self.parts:
            raise UsageError(f"no part of the loss can be computed: it weighs {self.loss.used}; give the classifier or decoder")
        if not self.parts & {"classification", "triplet"}:
            backbone.to_embedding.requires_grad_(False)  # the loss does not use it, and DDP would wait for its gradient
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(tuple(values)).view(-1, 1, 1), persistent=False)

    @classmethod
    def build(
        cls,
        data: Any,
        *,
        encoder: Component,
        loss: Component,
        triplet: Component,
        reconstruction: Component,
        kl: Component,
        weights: Mapping[str, float],
        steps: int,
        kl_warmup: float = 0.0,
        kernel_size: Literal[2, 3, 4] = 4,
        supervised: bool = True,
        conditional: bool = False,
        label_smoothing: float = 0.0,
        **vit: Any,
    ) -> "MultiTaskVAE":
        """The model of the VAE recipes, for a dataset: each part is built through its registry.

        The backbone is `encoder` with the arguments `vit` of its vision transformer, or a
        `vae_encoder` around another backbone. The classifier has 128 hidden
        dimensions. It is left out if its weight is 0, or without `supervised`. The decoder (see `ConvDecoder`) is left out
        if its weight is 0. The KL weight grows over the share `kl_warmup` of `steps` training steps. With progressive
        weights, the weight of a part grows over a sixth of the steps.
        """
        channels, height, width = data.shape
        classes = len(data.classes)
        backbone = build_encoder(encoder, img_size=height if height == width else (height, width), in_chans=channels, **vit)
        classifier = decoder = None
        if weights["classification"] and supervised:
            classifier = heads.build("vitkit:mlp", in_dim=backbone.embedding_dim, out_dim=classes, hidden=CLASSIFIER_WIDTH)
        if weights["reconstruction"]:
            decoder = heads.build(
                "vitkit:conv_decoder",
                in_dim=backbone.latent_dim,
                out_dim=channels,
                img_size=backbone.img_size,
                kernel_size=kernel_size,
                num_classes=classes if conditional else None,
            )
        return cls(
            backbone,
            classifier,
            decoder,
            loss=loss.build(weights=dict(weights), warmup=round(kl_warmup * steps), stage=max(1, steps // 6)),
            triplet=triplet.build(),
            reconstruction=reconstruction.build(),
            kl=kl.build(),
            mean=data.mean,
            std=data.std,
            num_classes=classes,
            supervised=supervised,
            label_smoothing=label_smoothing,
        )

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The values of the parts that are used, for a model that ignores the image.

        "classification": ln K for `num_classes` K; "triplet": the margin; "kl": 0; "reconstruction": an image of the constant
        colour `mean`, see `ReconstructionLoss.uninformed_pixels`. "loss" is their weighted sum, with fixed weights.
        """
        parts = {"triplet": self.triplet.uninformed(batch_size)["loss"], "kl": self.kl.uninformed(batch_size)["loss"]}
        if self.num_classes is not None:
            parts["classification"] = math.log(self.num_classes)
        if self.decoder is not None and float(self.std.max()) <= 0.5:  # no pixels in [0, 1] vary more: std was not given
            mean, std, pixels = self.mean.flatten().tolist(), self.std.flatten().tolist(), math.prod(self.decoder.img_size)
            constant = self.reconstruction.uninformed_pixels(mean, std, pixels)
            parts |= {} if constant is None else {"reconstruction": constant}
        return self.loss.uninformed(batch_size, {name: parts[name] for name in self.loss.used if name in self.parts & parts.keys()})

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features of each sample: its `labels`, `partners` and `weights`, and those of the used parts:

        `embeddings` `(b v e)`, the anchors' `mu` and `log_var` `(b z)`, `decoded` logits and the `pixels` that they
        reconstruct `(b c h w)`, and `positives` and `negatives` `(b e)`.
        """
        images, labels = batch["images"], batch["labels"]
        views = images[:, None] if images.ndim == 4 else images
        if views.ndim != 5 or labels.shape != views.shape[:1]:
            raise UsageError(
                f"images are {tuple(images.shape)} and labels {tuple(labels.shape)}; "
                f"expected (batch, channels, height, width), or (batch, views, ...), and (batch,)"
            )
        anchors, count = len(labels), views.shape[1]
        rows = views.transpose(0, 1).flatten(0, 1)  # (v·b c h w)
        mu, log_var = self.backbone.encode_latent(rows)
        z = sample_latent(mu, log_var, views=count)
        features: dict[str, Tensor] = {name: batch[name] for name in ("labels", "partners", "weights") if name in batch}
        if self.parts & {"classification", "triplet"}:
            features["embeddings"] = self.backbone.embed(z).unflatten(0, (count, anchors)).transpose(0, 1)
        if "triplet" in self.parts and "positives" in batch:
            features |= {name: self._embed(batch[name]) for name in ("positives", "negatives")}
        if "reconstruction" in self.parts:
            features["decoded"] = self.decoder.logits(z[:anchors], self._decoder_labels(batch))
            features["pixels"] = (rows[:anchors].float() * self.std + self.mean).clamp(0, 1)
        if "kl" in self.parts:
            features |= {"mu": mu[:anchors], "log_var": log_var[:anchors]}
        return features

    def compute_loss(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts from the features of one batch, or of several joined batches."""
        parts: dict[str, Tensor] = {}
        active = None
        if "embeddings" in features:
            views = features["embeddings"].shape[1]
            embeddings = features["embeddings"].transpose(0, 1).flatten(0, 1)  # (v·b e)
            if "classification" in self.parts:
                assert self.classifier is not None
                parts["classification"] = self._classify(self.classifier(embeddings), features, views)
            if "triplet" in self.parts:
                triplets = self._triplets(embeddings, features, views)
                parts["triplet"], active = triplets["loss"], triplets["active"]
        if "reconstruction" in self.parts:
            parts["reconstruction"] = self.reconstruction(features["decoded"], features["pixels"])["loss"]
        if "kl" in self.parts:
            parts["kl"] = self.kl(features["mu"], features["log_var"])["loss"]
        total = self.loss(parts)
        return total if active is None else {**total, "active": active}

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `(b c h w)` → embeddings `(b e)` of μ, the features of classifiers and probes."""
        features: Tensor = self.backbone.encode_image(images)
        return features

    def _classify(self, logits: Tensor, batch: dict[str, Tensor], views: int) -> Tensor:
        """Cross-entropy in nats, the mean over samples with a label."""
        labels = batch["labels"].repeat(views)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            losses = self._cross_entropy(logits, labels)
            if "partners" in batch:
                weights = batch["weights"].repeat(views)
                losses = weights * losses + (1 - weights) * self._cross_entropy(logits, batch["partners"].repeat(views))
        count = (labels != UNLABELLED).sum().float()
        return all_reduce_sum(losses.sum()) / all_reduce_sum(count).clamp(min=1)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, reduction="none", ignore_index=UNLABELLED, label_smoothing=self.label_smoothing
        )

    def _triplets(self, embeddings: Tensor, batch: dict[str, Tensor], views: int) -> dict[str, Tensor]:
        if "positives" in batch:
            return self.triplet(embeddings, positives=batch["positives"], negatives=batch["negatives"])
        labels = batch["labels"]
        if not self.supervised:
            if views == 1:
                raise UsageError("without labels the positives of an image are its other views: make batches with views=2")
            labels = torch.arange(len(labels), device=labels.device) + (rank() << 32)  # the views of one image are a class
        elif "partners" in batch:
            labels = torch.where(batch["weights"] >= 0.5, labels, batch["partners"])
        return self.triplet(embeddings, labels.repeat(views))

    def _embed(self, images: Tensor) -> Tensor:
        """Images → embeddings of sampled latents `(b e)`."""
        embeddings: Tensor = self.backbone.embed(sample_latent(*self.backbone.encode_latent(images)))
        return embeddings

    def _decoder_labels(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The labels `(b,)` for a conditional decoder; None for another one."""
        if self.decoder.num_classes is None or not self.supervised:
            return None
        if "weights" in batch:
            return torch.where(batch["weights"] == 1, batch["labels"], UNLABELLED)
        return batch["labels"]
