"""Images from latents, by transposed convolutions."""

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.validation import at_least, one_of

WIDTHS = (256, 128, 64)
KERNELS = {2: (0, 0), 3: (1, 1), 4: (1, 0)}
"""Padding and output padding with which a kernel of stride 2 doubles a side."""


class ConvDecoder(nn.Module):
    """Latents `(b in_dim)` → images `(b out_dim h w)` in [0, 1] of `img_size` pixels.

    A linear map to a grid of 256 channels, then three transposed convolutions that double it: 4×4×256 → 8×8×128 → 16×16×64
    → 32×32×`out_dim`. A layer norm over the channels and GELU come before each convolution, and a sigmoid comes at the end.
    The first grid has ⌈side/8⌉ positions per side. The result is cropped to `img_size` at its centre, for example from
    32×32 to 28×28.

    With a `kernel_size` of 4 the convolutions overlap evenly. With 3 they overlap unevenly, and a step takes 0.75 of the
    time. With 2 they do not overlap, and a step takes half of the time; each position of the first grid then decodes 8×8
    pixels independently.

    With `num_classes` it is a conditional decoder: the embedding of the class, of `in_dim` dimensions, is added to the latent;
    nothing is added for label −1 or without labels.

    Raises `UsageError` if a dimension is below 1, latents have another width, or labels do not fit.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        img_size: int | tuple[int, int] = 32,
        num_classes: int | None = None,
        kernel_size: Literal[2, 3, 4] = 4,
    ) -> None:
        super().__init__()
        one_of(KERNELS, kernel_size=kernel_size)
        sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(sizes) != 2 or min(sizes) < 1:
            raise UsageError(f"img_size is {img_size!r}; expected a number of pixels or (height, width)")
        at_least(1, in_dim=in_dim, out_dim=out_dim, num_classes=num_classes)
        self.in_dim, self.out_dim, self.img_size, self.num_classes = in_dim, out_dim, sizes, num_classes
        self.grid = (-(-sizes[0] // 8), -(-sizes[1] // 8))
        self.label_embed = nn.Embedding(num_classes, in_dim) if num_classes is not None else None
        self.fc = nn.Linear(in_dim, self.grid[0] * self.grid[1] * WIDTHS[0])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in WIDTHS)
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, kernel_size, 2, *KERNELS[kernel_size])
            for wide, narrow in pairwise((*WIDTHS, out_dim))
        )
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"in_dim": 8, "out_dim": 1, "img_size": 8}, {}

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents `(b in_dim)`, for a conditional decoder with labels int64 `(b,)` → images `(b c h w)` in [0, 1]."""
        return self.logits(z, labels).float().sigmoid()

    def logits(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The values of `forward` before the sigmoid."""
        if z.ndim != 2 or z.shape[1] != self.in_dim:
            raise UsageError(f"latents are {tuple(z.shape)}; expected (batch, {self.in_dim})")
        if labels is not None:
            z = z + self._class(z, labels)
        x = self.fc(z).unflatten(1, (*self.grid, WIDTHS[0]))  # (b h w 256)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            # Channels last in memory: the rows of the norm, and the fastest layout for convolutions.
            x = conv(F.gelu(norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        (height, width), (high, wide) = self.img_size, x.shape[1:3]
        top, left = (high - height) // 2, (wide - width) // 2
        return x[:, top : top + height, left : left + width].permute(0, 3, 1, 2)

    def _class(self, z: Tensor, labels: Tensor) -> Tensor:
        """The embeddings of the classes `(b in_dim)`, to be added to the latents."""
        if self.label_embed is None or self.num_classes is None:
            raise UsageError("labels were given to a decoder without classes; build it with num_classes, or leave them out")
        if labels.shape != z.shape[:1] or labels.dtype != torch.int64:
            raise UsageError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(z)},)")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = labels[(labels < -1) | (labels >= self.num_classes)]
            if len(outside):
                raise UsageError(
                    f"label {int(outside[0])} is not one of this decoder's {self.num_classes} classes, 0 … {self.num_classes - 1}"
                )
        return self.label_embed(labels.clamp(min=0)) * (labels >= 0)[:, None]
