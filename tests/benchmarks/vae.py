"""The multi-task VAE's training step on ViT 192/6/3 at 64 tokens, beside timm's blocks with pytorch-metric-learning.

A step takes 64 images with labels through the encoder, semi-hard triplets mined in the batch, the classifier, the decoder
and all four losses, the backward pass and AdamW. The peer's encoder is timm's ViT, its triplets are mined and weighed by
pytorch-metric-learning; classifier and decoder are the same on both sides, and so are the weights they start from. Tuned by
hand is as for JEPA.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.training import adamw
from vitkit_vae import MultiTaskVAE

from .jepa import unfused
from .timing import Call, Options, Row, compare_steps, training_step

SIZE, CLASSES, MARGIN = 32, 10, 0.2
WEIGHTS = {"classification": 1.0, "triplet": 0.5, "reconstruction": 1.0, "kl": 0.01}


def parts() -> tuple[Any, nn.Module, Any]:
    torch.manual_seed(0)
    backbone = backbones.build(
        "vae_encoder", img_size=SIZE, embed_dim=192, depth=6, num_heads=3, positions="learned"
    )
    classifier = heads.build("mlp", in_dim=backbone.embedding_dim, out_dim=CLASSES)
    return backbone, classifier, heads.build("conv_decoder", in_dim=backbone.latent_dim, out_dim=3, img_size=SIZE)


def vitkit_step(batch: dict[str, Tensor]) -> Call:
    model = MultiTaskVAE(*parts(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return training_step(model, lambda: model(batch)["loss"], adamw(model, lr=1e-4), bf16=True)


class Peer(nn.Module):
    """The same network and losses on timm's blocks."""

    def __init__(self, *, tuned: bool) -> None:
        super().__init__()
        backbone, self.classifier, self.decoder = parts()
        self.vit = VisionTransformer(
            img_size=SIZE, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=0, global_pool="avg",
            class_token=False, fc_norm=False,
        )  # fmt: skip
        self.vit.load_state_dict(backbone.vit.state_dict())
        if tuned:
            unfused(self.vit)
        self.to_latent, self.to_embedding = backbone.to_latent, backbone.to_embedding

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        mu, log_var = self.to_latent(self.vit(images)).float().chunk(2, dim=1)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
        embeddings = self.to_embedding(z)
        return mu, log_var, embeddings, self.classifier(embeddings), self.decoder.logits(z)


def peer_step(batch: dict[str, Tensor], *, tuned: bool, compiled: bool) -> Call:
    model = Peer(tuned=tuned)
    mine, triplet = TripletMarginMiner(MARGIN, type_of_triplets="semihard"), TripletMarginLoss(MARGIN)
    images, labels = batch["images"], batch["labels"]
    pixels = (images * 0.25 + 0.5).clamp(0, 1)

    def loss() -> Tensor:
        mu, log_var, embeddings, classes, decoded = (out.float() for out in model(images))
        found = {
            "classification": F.cross_entropy(classes, labels),
            "triplet": triplet(embeddings, labels, mine(embeddings, labels)),
            "reconstruction": F.mse_loss(decoded.sigmoid(), pixels),
            "kl": -0.5 * (1 + log_var - mu.square() - log_var.exp()).mean(),
        }
        return sum((WEIGHTS[name] * value for name, value in found.items()), torch.zeros(()))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tuned)
    return training_step(model, loss, optimizer, bf16=tuned, compiled=tuned and compiled)


def rows(options: Options) -> list[Row]:
    count = 16 if options.quick else 64
    torch.manual_seed(0)
    batch = {"images": torch.randn(count, 3, SIZE, SIZE), "labels": torch.randint(0, CLASSES, (count,))}
    steps = {
        "vitkit": vitkit_step(batch),
        "documented": peer_step(batch, tuned=False, compiled=False),
        "tuned": peer_step(batch, tuned=True, compiled=options.compiled),
    }
    what, peer = f"training step, {count} images", "timm's ViT, pytorch-metric-learning"
    return [compare_steps("VAE", what, "images", count, steps, options, wanted="tuned ≥ 2", peer=peer)]
