"""LeJEPA's training step on ViT 192/6/3 at 65 tokens, two views a sample, beside timm's ViT with lightly's loss.

A step takes CLS and 64 patches a view through the encoder and a projection to 64 dimensions, the loss with 256 directions,
the backward pass and AdamW. All sides start from the same weights. Tuned by hand is bf16 autocast, torch.compile, AdamW
fused, and attention as batched products, which train faster on CPUs than torch's flash attention at this length.

A second row sets stable-pretraining's LeJEPA beside it where that is installed (`pip install stable-pretraining`; it is not in the
extra `bench`, as fifty packages come with it): the same ViT of timm's, of which it asks one view in each of two calls, with its own
loss of one global and one local view.
"""

import importlib.util

import torch
from lightly.loss import LeJEPALoss as LightlyLeJEPALoss
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitkit import losses
from vitkit.training import adamw
from vitkit_vit import ViT

from .timing import Call, Options, Row, compare_steps, training_step

VIEWS, DIRECTIONS = 2, 256


class Pooled(nn.Module):
    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.encode_image(images)


def vitkit_step(images: Tensor) -> Call:
    torch.manual_seed(0)
    model = nn.Sequential(Pooled(ViT(depth=6, dropout=0.0)), nn.Linear(192, 64))
    objective = losses.build("lejepa", directions=DIRECTIONS)

    def loss() -> Tensor:
        return objective(model(images).float().unflatten(0, (VIEWS, -1)))["loss"]

    return training_step(model, loss, adamw(model, lr=1e-4), bf16=True)


def peer_step(images: Tensor, *, tuned: bool, compiled: bool) -> Call:
    model = nn.Sequential(peer_vit(tuned=tuned), nn.Linear(192, 64))
    objective = LightlyLeJEPALoss(sigreg_num_vectors=DIRECTIONS)

    def loss() -> Tensor:
        first, second = model(images).float().unflatten(0, (VIEWS, -1)).split(1)
        # lightly computes over local and global views together: one of each is the two views, each once.
        return objective(local_proj=second, global_proj=first)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tuned)
    return training_step(model, loss, optimizer, bf16=tuned, compiled=tuned and compiled)


def stable_pretraining_step(images: Tensor, *, tuned: bool, compiled: bool) -> Call:
    from stable_pretraining.methods.lejepa import LeJEPA  # it takes long and sets up logging

    model = LeJEPA("vit_tiny_patch16_224", projector=nn.Linear(192, 64), n_slices=DIRECTIONS, drop_path_rate=0.0)
    model.backbone = peer_vit(tuned=tuned)

    def loss() -> Tensor:
        first, second = images.chunk(VIEWS)
        return model(global_views=[first], local_views=[second]).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tuned)
    return training_step(model.backbone, loss, optimizer, bf16=tuned, compiled=tuned and compiled)


def peer_vit(*, tuned: bool) -> VisionTransformer:
    """timm's, from vitkit's weights; tuned, with attention as batched products."""
    vit = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=0, global_pool="token"
    )
    torch.manual_seed(0)
    vit.load_state_dict(ViT(depth=6, dropout=0.0).state_dict())
    if tuned:
        unfused(vit)
    return vit


def unfused(vit: VisionTransformer) -> None:
    """Attention as batched products."""
    for block in vit.blocks:
        block.attn.fused_attn = False


def rows(options: Options) -> list[Row]:
    samples = 16 if options.quick else 64
    torch.manual_seed(0)
    images = torch.randn(VIEWS * samples, 3, 32, 32)
    peers = {"timm's ViT, lightly's LeJEPALoss": peer_step}
    if importlib.util.find_spec("stable_pretraining") is not None:
        peers["stable-pretraining's LeJEPA"] = stable_pretraining_step
    wanted, what = "documented ≥ 3.2, tuned ≥ 2.6, ceiling ≥ 50 %", f"training step, {samples} samples"
    found = []
    for peer, make in peers.items():
        steps = {
            "vitkit": vitkit_step(images),
            "documented": make(images, tuned=False, compiled=False),
            "tuned": make(images, tuned=True, compiled=options.compiled),
        }
        found.append(compare_steps("JEPA", what, "views", VIEWS * samples, steps, options, wanted=wanted, peer=peer))
    return found
