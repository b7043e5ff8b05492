"""A residual convolutional stem: maps of several scales from the pixels of one half."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitkit.errors import UsageError

EPS = 1e-6


class ResidualStem(nn.Module):
    """Images `(b c h w)` → one map `(b h_i w_i widths[i])` per stage, channels last. Each stage halves both sides.

    The first stage folds 2×2 pixels into channels and then applies a 3×3 convolution. Every other stage begins with a 3×3
    convolution of stride 2. Then each stage has `depth` residual blocks of two 3×3 convolutions. A layer norm over channels
    and a GELU come before each of these convolutions (He et al., arXiv 1603.05027). A norm uses one position only, so that
    a sample does not depend on its batch.

    Weights are initialised by Kaiming's rule; the last convolution of a block starts at zero. Raises `UsageError` if there
    is no stage, a width is below 1 or the depth is negative.
    """

    def __init__(self, in_chans: int, widths: Sequence[int], depth: int = 1) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or depth < 0:
            raise UsageError(
                f"stem widths are {list(widths)} and its depth {depth}; expected positive widths, a depth >= 0"
            )
        self.stride = 2 ** len(widths)
        self.entry = Conv(4 * in_chans, widths[0])
        self.downs = nn.ModuleList(_Down(narrow, wide) for narrow, wide in pairwise(widths))
        self.stages = nn.ModuleList(nn.Sequential(*(_Residual(width) for _ in range(depth))) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        # Like F.pixel_unshuffle, which does not accept an empty batch.
        folded = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=2, q=2)
        x = self.entry(folded.permute(0, 3, 1, 2))
        maps = []
        for number, stage in enumerate(self.stages):
            x = stage(x if number == 0 else self.downs[number - 1](x))
            maps.append(x.permute(0, 2, 3, 1))
        return maps


class _Norm(nn.LayerNorm):
    """Layer norm over the channels of `(b c h w)`, which are adjacent in memory, then GELU; in the dtype of the input."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        return F.gelu(F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)).permute(0, 3, 1, 2)


class _Down(nn.Module):
    """A norm and a convolution of stride 2."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.norm = _Norm(narrow)
        self.conv = Conv(narrow, wide, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class _Residual(nn.Module):
    """x + conv(norm(conv(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _Norm(width), Conv(width, width)
        self.norm2, self.conv2 = _Norm(width), Conv(width, width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Conv(nn.Linear):
    """A 3×3 convolution without bias. Its weight is a matrix `(out, 9·in)`, so that optimisers for matrices such as Muon
    apply to it.
    """

    def __init__(self, narrow: int, wide: int, stride: int = 1) -> None:
        super().__init__(9 * narrow, wide, bias=False)
        self.stride = stride
        nn.init.kaiming_normal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight.unflatten(1, (-1, 3, 3)), stride=self.stride, padding=1)
