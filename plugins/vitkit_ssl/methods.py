"""The methods by name: each makes a model and its views from the same backbone."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from vitkit import heads, losses
from vitkit.data import View
from vitkit.errors import UsageError
from vitkit.training import cosine
from vitkit.validation import one_of
from vitkit_ssl.byol import BYOL
from vitkit_ssl.dino import DINO
from vitkit_ssl.joint import JointEmbedding, Supervised
from vitkit_ssl.mae import MAE
from vitkit_ssl.views import Augment, augmentation, multi_crop

Method = Literal["mae", "dino", "simclr", "byol", "lejepa", "supervised"]
METHODS: tuple[Method, ...] = ("mae", "dino", "simclr", "byol", "lejepa", "supervised")
PROJECTION: Mapping[str, Any] = {"out_dim": 64, "hidden": 512, "norm": "batch"}
PROTOTYPES = 1024


def views_of(method: Method, augment: Augment, channels: int, img_size: int, *, local: int = 4) -> list[View]:
    """The views that a method compares: two, for DINO also `local` small ones; for MAE and training with labels a single one.

    With "auto" MAE only crops and mirrors photographs, as its paper does. Raises `UsageError` for an unknown method.
    """
    one_of(METHODS, method=method)
    if method == "mae":
        return [View(transform=augmentation("crop" if augment == "auto" and channels > 1 else augment, channels))]
    if method == "supervised":
        return [View(transform=augmentation(augment, channels))]
    return multi_crop(augment, channels, img_size, local=local if method == "dino" else 0)


def build_method(method: Method, backbone: Any, *, classes: int = 0, keep: float = 1.0, momentum: float = 0.99) -> nn.Module:
    """The model of a method over `backbone`, with the heads and the loss of its registered names.

    - "mae": `mae_decoder`, `masked_reconstruction`; three quarters of the patches are masked.
    - "dino": `dino`, with 1,024 prototypes.
    - "simclr": `mlp` with batch norm, `nt_xent`. "byol": two of them, `byol`. "lejepa": one of them, `lejepa`.
    - "supervised": `linear` and cross entropy, for the comparison; `classes` is the number of classes.

    `keep` is the share of the patches that each view of the student uses; MAE masks patches by itself, and "supervised" uses all.
    `momentum` is that of the teacher of DINO and BYOL at the first step; it rises to 1. Raises `UsageError` for an unknown method, and
    for "supervised" without classes.
    """
    one_of(METHODS, method=method)
    width: int = backbone.embed_dim

    def projector(in_dim: int) -> nn.Module:
        built: nn.Module = heads.build("vitkit:mlp", in_dim=in_dim, **PROJECTION)
        return built

    if method == "mae":
        pixels = backbone.in_chans * backbone.patch_size**2
        decoder = heads.build("vitkit:mae_decoder", in_dim=width, out_dim=pixels, grid_size=list(backbone.grid_size))
        return MAE(backbone, decoder, losses.build("vitkit:masked_reconstruction"))
    if method == "dino":
        head = heads.build("vitkit:dino", in_dim=width, out_dim=PROTOTYPES)
        return DINO(backbone, head, losses.build("vitkit:dino", out_dim=PROTOTYPES), momentum=cosine(momentum, 1.0), keep=keep)
    if method == "byol":
        heads_of_byol = projector(width), projector(int(PROJECTION["out_dim"]))
        return BYOL(backbone, *heads_of_byol, losses.build("vitkit:byol"), momentum=cosine(momentum, 1.0), keep=keep)
    if method == "supervised":
        if classes < 2:
            raise UsageError("method 'supervised' needs images with labels of two classes or more; take another method for these images")
        return Supervised(backbone, heads.build("vitkit:linear", in_dim=width, out_dim=classes))
    return JointEmbedding(backbone, projector(width), losses.build("vitkit:nt_xent" if method == "simclr" else "vitkit:lejepa"), keep=keep)


__all__ = ["METHODS", "Method", "build_method", "views_of"]
