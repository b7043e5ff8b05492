"""The patch embedding, and convolutions in its place."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitkit.errors import UsageError


class ConvStem(nn.Module):
    """3×3 convolutions of stride 2, each with a layer norm and GELU, then a 1×1: images `(b c h w)` → patches `(b n d)`.

    There are log₂ `patch_size` of them; the last has `embed_dim` channels and each one before it half as many. The norm is
    over the channels of a position, so that training is the same on one rank and on many, and evaluation as training.
    Weights are drawn by Kaiming's rule, biases are zero. Raises `UsageError` if `patch_size` is not a power of two or
    `embed_dim` not divisible that often.

    Source: Xiao et al., Early Convolutions Help Transformers See Better, arXiv 2106.14881; there with batch norm and ReLU.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        count = patch_size.bit_length() - 1
        if count < 1 or patch_size != 2**count:
            near = max(2, 2**count)
            raise UsageError(
                f"stem='conv' halves the image until patch_size={patch_size} is one position, expected a power of two from "
                f"2 on; take patch_size={near} or stem='patch'"
            )
        if embed_dim % 2 ** (count - 1):
            raise UsageError(
                f"stem='conv' halves embed_dim={embed_dim} {count - 1} times; take a multiple of {2 ** (count - 1)}"
            )
        widths = [in_chans, *(embed_dim // 2 ** (count - 1 - i) for i in range(count))]
        self.convs = nn.ModuleList(
            nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1, bias=False)
            for narrow, wide in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(wide, eps=1e-6) for wide in widths[1:])
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)
        for conv in (*self.convs, self.proj):
            nn.init.kaiming_normal_(conv.get_parameter("weight"))
        nn.init.zeros_(self.proj.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        # A position's channels, which its norm runs over, lie side by side in this format.
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch: images `(b c h w)` → patches `(b n d)`."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        nn.init.kaiming_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        # Patches do not overlap, so the convolution is one matrix product, which suits CPUs better.
        size = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
