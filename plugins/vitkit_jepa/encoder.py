"""A vision transformer whose blocks process a label token beside the patches."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit.models import encode_image
from vitkit.registry import NESTED_BACKBONE


class MultimodalViT(nn.Module):
    """Images `(b c h w)`, labels `(b,)` or both → features `(b d)`, by one stack of transformer blocks.

    A label becomes a token: the embedding of its class plus an embedding that marks labels. The token follows the patches
    of the backbone `vit`, and patches and label attend to each other. Features are pooled as in `vit`: the mean over
    patches and label, or the CLS token.

    All classes start from the same embedding, zero, so that before training, and in a model trained without
    labels, all classes are equally near to every image. Training makes them different from its first step.

    `backbone` is the registered backbone around which the model is built, `backbone_args` its arguments beside `img_size` and
    `in_chans`. A label can enter only a stack that takes `extra_tokens`, such as `vit` and `cct`; another backbone (`takes_labels` is
    False) encodes images alone. The other arguments here, from `patch_size` on, are those of `vit`.

    Raises `UsageError` for fewer than one class, if the backbone does, and for a label or a choice of patches that it cannot take.
    """

    vitkit_architecture: ClassVar = NESTED_BACKBONE

    def __init__(
        self,
        *,
        num_classes: int = 10,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 1,
        embed_dim: int = 192,
        depth: int = 6,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        pool: Literal["cls", "mean"] = "mean",
        positions: Literal["learned", "sincos1d", "sincos2d", "none"] = "learned",
        registers: int = 0,
        checkpoint: bool = False,
        backbone: str = "vitkit:vit",
        backbone_args: Mapping[str, Any] | None = None,
    ) -> None:
        if num_classes < 1:
            raise UsageError(f"num_classes is {num_classes}; expected at least 1")
        of_vit = {
            "patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
            "dropout": dropout, "drop_path": drop_path, "pool": pool, "positions": positions, "registers": registers,
            "checkpoint": checkpoint,
        }  # fmt: skip
        given = (of_vit if backbone in ("vit", "vitkit:vit") else {}) | dict(backbone_args or {})
        vit = backbones.build(backbone, **{"img_size": img_size, "in_chans": in_chans} | given)  # refuses arguments before a module exists
        super().__init__()
        self.vit = vit
        self.takes_labels = "extra_tokens" in inspect.signature(self.vit.forward).parameters
        self.num_classes = num_classes
        self.embed_dim: int = self.vit.embed_dim
        self.num_patches: int = getattr(self.vit, "num_patches", 0)
        self.grid_size: tuple[int, int] = getattr(self.vit, "grid_size", (0, 0))
        self.label_embed = nn.Embedding(num_classes, self.embed_dim)
        self.label_type = nn.Parameter(torch.empty(1, self.embed_dim))
        nn.init.zeros_(self.label_embed.weight)
        nn.init.normal_(self.label_type, std=0.02)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"img_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay."""
        return {"label_type"}

    def forward(
        self, x: Tensor | None, *, extra_tokens: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Images `(b c h w)` → tokens `(b n d)`; arguments as for `vit`."""
        if extra_tokens is None and keep is None:
            return self.vit(x)
        self.check_takes_labels()
        return self.vit(x, extra_tokens=extra_tokens, keep=keep)

    def check_takes_labels(self) -> None:
        """Raise `UsageError` if the backbone's stack takes no further tokens, and so neither a label nor a choice of patches."""
        if not self.takes_labels:
            raise UsageError(
                f"{type(self.vit).__name__} takes neither a label's token nor a choice of patches: its windows or convolutions have room "
                f"for whole maps only; take vit or cct, or train without labels (--no-multimodal) on all patches"
            )

    def label_tokens(self, labels: Tensor) -> Tensor:
        """Labels `(b,)` → tokens `(b 1 d)`: int64 in [0, num_classes), or −1 for a token without a class.

        Raises `UsageError` as `check_labels` does.
        """
        self.check_takes_labels()
        self.check_labels(labels)
        labelled = (labels >= 0)[:, None]
        return (self.label_embed(labels.clamp(min=0)) * labelled + self.label_type)[:, None]

    def check_labels(self, labels: Tensor) -> None:
        """Raise `UsageError` for labels of another dtype or shape and, on the CPU, outside the classes.

        On other devices the check would synchronise the device at every step; there the embedding itself fails.
        """
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise UsageError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 (batch,)")
        if labels.device.type != "cpu" or torch.compiler.is_compiling():
            return
        outside = labels[(labels < -1) | (labels >= self.num_classes)]
        if len(outside):
            raise UsageError(
                f"label {int(outside[0])} is not one of this model's {self.num_classes} classes, "
                f"0 … {self.num_classes - 1}; build it with the dataset's number of classes"
            )

    def encode_image(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Images `(b c h w)` → `(b d)`; `keep` `(b k)` names the patches to use."""
        if keep is None:
            return encode_image(self.vit, x)
        self.check_takes_labels()
        return self.vit.encode_image(x, keep=keep)

    def encode_label(self, labels: Tensor) -> Tensor:
        """Labels `(b,)` → `(b d)`: the features of the label's token without patches."""
        return self.vit.encode_image(None, extra_tokens=self.label_tokens(labels))

    def encode_multimodal(self, x: Tensor, labels: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Images `(b c h w)` with their labels `(b,)` → `(b d)`; patches and label attend to each other."""
        return self.vit.encode_image(x, extra_tokens=self.label_tokens(labels), keep=keep)

    def label_attention(self, x: Tensor, labels: Tensor) -> Tensor:
        """The attention of the label's token to each patch: `(b h w)` over the grid of patches.

        Attention rollout (Abnar and Zuidema, arXiv 2005.00928): the matrix of a block is the mean of its weights over heads
        and the identity (for the residual stream), in equal parts. The result is the row of the label and the columns of
        the patches in the product of all blocks' matrices.
        """
        maps = self.vit.attention_maps(x, extra_tokens=self.label_tokens(labels)).mean(dim=2)  # (b depth n n)
        rollout = torch.eye(maps.shape[-1], device=maps.device, dtype=maps.dtype).expand(len(maps), -1, -1)
        for depth in range(maps.shape[1]):
            rollout = (maps[:, depth] @ rollout + rollout) / 2
        return rollout[:, -1, -1 - self.num_patches : -1].unflatten(1, self.grid_size)
