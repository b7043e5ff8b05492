"""Any backbone as the image tower: each half of a pair by itself."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit.models import encode_image
from vitkit.registry import NESTED_BACKBONE


class PairBackbone(nn.Module):
    """Pairs of images side by side `(b c h 2w)` → the tokens of the left half, then those of the right half, `(b n d)`.

    Both halves go through the same registered `backbone`, whose arguments beside `img_size` and `in_chans` are `backbone_args`. A half's
    feature is the backbone's pooled one. The feature of a pair is a linear map of both, as in `pair_vit`; so left and right
    differ. No block sees both halves.

    `img_size` is that of one half, pixels or (height, width). Raises `UsageError` for pairs of another shape, and if the backbone does.
    """

    vitkit_architecture: ClassVar = NESTED_BACKBONE

    def __init__(
        self, backbone: str = "vitkit:vit", *, img_size: int | Sequence[int] = 32, in_chans: int = 3,
        backbone_args: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        size = height if height == width else [height, width]
        given = {"img_size": size, "in_chans": in_chans} | dict(backbone_args or {})
        half = backbones.build(backbone, **given)  # refuses arguments before a module exists
        super().__init__()
        self.img_size, self.in_chans = (height, 2 * width), in_chans
        self.backbone = half
        self.embed_dim: int = self.backbone.embed_dim
        self.pair = nn.Linear(2 * self.embed_dim, self.embed_dim)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2}
        return {"img_size": 8, "backbone_args": arguments}, {"x": torch.randn(samples, 3, 8, 16)}

    def forward(self, x: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → tokens `(b n d)`."""
        return rearrange(self.backbone(self._halves(x)), "(b two) n d -> b (two n) d", two=2)

    def encode_image(self, x: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → features `(b d)`."""
        return self.join(self.encode_halves(x))

    def encode_halves(self, x: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → features of the left and of the right half `(b 2 d)`."""
        return encode_image(self.backbone, self._halves(x)).unflatten(0, (-1, 2))

    def join(self, halves: Tensor) -> Tensor:
        """Features of halves `(b 2 d)` → features of pairs `(b d)`."""
        return self.pair(halves.flatten(1))

    def _halves(self, x: Tensor) -> Tensor:
        expected = (self.in_chans, *self.img_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise UsageError(
                f"pairs are {tuple(x.shape)}; expected (batch, {', '.join(map(str, expected))}): two images side by side"
            )
        return rearrange(x, "b c h (two w) -> (b two) c h w", two=2)
