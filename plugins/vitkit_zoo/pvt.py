"""The pyramid vision transformer, version 2 (Wang et al., PVT v2: Improved Baselines with Pyramid Vision Transformer, arXiv 2106.13797)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from vitkit.validation import one_of
from vitkit_vit import attend, normalise
from vitkit_zoo.pyramid import (
    Pyramid,
    channels_first,
    channels_last,
    check_heads,
    check_size,
    check_sizes,
    chosen,
    draw_convolutions,
    draw_weights,
    image_size,
    rates,
)

EPS = 1e-6
POOLED = 7
"""Rows and columns of the keys with reduction="pool"."""
PUBLISHED: dict[str, Any] = {"patch_size": 4, "num_heads": (1, 2, 5, 8), "reductions": (8, 4, 2, 1), "mlp_ratios": (8, 8, 4, 4)}
SMALL: dict[str, Any] = {"patch_size": 2, "reductions": (4, 2, 1), "mlp_ratios": (4, 4, 4)}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny_32": SMALL | {"depths": (2, 2, 2), "widths": (32, 64, 128), "num_heads": (1, 2, 4)},
    "small_32": SMALL | {"depths": (2, 2, 4), "widths": (48, 96, 192), "num_heads": (1, 3, 6)},
    "base_32": SMALL | {"depths": (2, 4, 4), "widths": (80, 160, 320), "num_heads": (1, 5, 10)},
    "b0": PUBLISHED | {"depths": (2, 2, 2, 2), "widths": (32, 64, 160, 256)},
    "b1": PUBLISHED | {"depths": (2, 2, 2, 2), "widths": (64, 128, 320, 512)},
    "b2": PUBLISHED | {"depths": (3, 4, 6, 3), "widths": (64, 128, 320, 512)},
    "b3": PUBLISHED | {"depths": (3, 4, 18, 3), "widths": (64, 128, 320, 512)},
    "b4": PUBLISHED | {"depths": (3, 8, 27, 3), "widths": (64, 128, 320, 512)},
    "b5": PUBLISHED | {"depths": (3, 6, 40, 3), "widths": (64, 128, 320, 512), "mlp_ratios": (4, 4, 4, 4)},
}


class PVT(Pyramid):
    """Pyramid vision transformer v2: images `(b c h w)` → tokens `(b n d)` after the last layer norm.

    Patches overlap: a convolution with a kernel of 2·`patch_size` − 1 pixels and stride `patch_size` embeds them, and one of 3×3
    with stride 2 begins each further stage. A stage has `depths[i]` pre-norm blocks and a layer norm. In attention, every
    position is a query; keys and values are those of a map that a convolution shrinks by `reductions[i]` on each side. The MLP has
    a depthwise 3×3 convolution before its GELU, which takes the place of position embeddings.

    | preset   | for images of   | patch_size | depths      | widths            | heads      | reductions | mlp_ratios | parameters |
    |----------|-----------------|------------|-------------|-------------------|------------|------------|------------|------------|
    | tiny_32  | 28 to 64 pixels | 2          | 2, 2, 2     | 32, 64, 128       | 1, 2, 4    | 4, 2, 1    | 4, 4, 4    | 700,096    |
    | small_32 | 28 to 64 pixels | 2          | 2, 2, 4     | 48, 96, 192       | 1, 3, 6    | 4, 2, 1    | 4, 4, 4    | 2,460,576  |
    | base_32  | 28 to 64 pixels | 2          | 2, 4, 4     | 80, 160, 320      | 1, 5, 10   | 4, 2, 1    | 4, 4, 4    | 7,605,600  |
    | b0       | 224 pixels      | 4          | 2, 2, 2, 2  | 32, 64, 160, 256  | 1, 2, 5, 8 | 8, 4, 2, 1 | 8, 8, 4, 4 | 3,409,760  |
    | b1       | 224 pixels      | 4          | 2, 2, 2, 2  | 64, 128, 320, 512 | 1, 2, 5, 8 | 8, 4, 2, 1 | 8, 8, 4, 4 | 13,496,000 |
    | b2       | 224 pixels      | 4          | 3, 4, 6, 3  | 64, 128, 320, 512 | 1, 2, 5, 8 | 8, 4, 2, 1 | 8, 8, 4, 4 | 24,849,856 |
    | b3       | 224 pixels      | 4          | 3, 4, 18, 3 | 64, 128, 320, 512 | 1, 2, 5, 8 | 8, 4, 2, 1 | 8, 8, 4, 4 | 44,725,696 |
    | b4       | 224 pixels      | 4          | 3, 8, 27, 3 | 64, 128, 320, 512 | 1, 2, 5, 8 | 8, 4, 2, 1 | 8, 8, 4, 4 | 62,043,072 |
    | b5       | 224 pixels      | 4          | 3, 6, 40, 3 | 64, 128, 320, 512 | 1, 2, 5, 8 | 8, 4, 2, 1 | 4, 4, 4, 4 | 81,443,008 |

    The other arguments replace the preset's.

    - `reduction`: how keys and values shrink: "convolution" by `reductions`; "pool" to 7×7 means, whatever the image's size, as in the
      published "linear" models (b2_li of timm), which also have a ReLU before the depthwise convolution.
    - `dropout`: the probability in [0, 1) that a channel is dropped in the MLP and after attention; `attn_dropout` that an
      attention weight is. `drop_path`: that a sample skips a branch of the last block, growing linearly from 0 at the first.

    As in the published code, rows and columns that a reduction does not divide have no keys: of a map of 14×14 reduced by 4, keys
    cover 12×12. Parameters are named as timm names them; `vitkit.load_weights` also reads the authors' names. Linear weights are
    drawn from Normal(0, 0.02), cut off at two units, convolutions from Normal(0, √(2 / fan-out)); biases are zero. Raises
    `UsageError` for arguments that do not fit each other and images that are too small.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        preset: Literal["tiny_32", "small_32", "base_32", "b0", "b1", "b2", "b3", "b4", "b5"] = "small_32",
        patch_size: int | None = None,
        depths: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        reductions: Sequence[int] | None = None,
        mlp_ratios: Sequence[int] | None = None,
        reduction: Literal["convolution", "pool"] = "convolution",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        one_of(("convolution", "pool"), reduction=reduction)
        values = chosen(
            PRESETS, preset, patch_size=patch_size, depths=depths, widths=widths, num_heads=num_heads, reductions=reductions,
            mlp_ratios=mlp_ratios,
        )  # fmt: skip
        check_sizes(in_chans=in_chans, drop_path=drop_path, dropout=dropout, attn_dropout=attn_dropout, **values)
        check_heads(values["widths"], values["num_heads"])
        self.in_chans, self.img_size, self.patch_size = in_chans, image_size(img_size), values["patch_size"]
        self.widths = values["widths"]
        self.embed_dim = self.widths[-1]
        # A map of r rows has keys if it has at least as many rows as the reduction: ⌈pixels / step⌉ ≥ reduction.
        steps = [self.patch_size * 2**number for number in range(len(self.widths))]
        shrinks = values["reductions"] if reduction == "convolution" else (1,) * len(steps)
        least = max((shrink - 1) * step + 1 for shrink, step in zip(shrinks, steps, strict=True))
        self.least_size = (least, least)
        check_size("PVT", self.img_size, self.least_size)
        self.patch_embed = PatchEmbed(in_chans, self.widths[0], 2 * self.patch_size - 1, self.patch_size)
        skipped = rates(drop_path, values["depths"])
        self.stages = nn.ModuleList(
            Stage(
                self.widths[i - 1] if i else None,
                width,
                [
                    Block(
                        width, values["num_heads"][i], values["mlp_ratios"][i], 0 if reduction == "pool" else values["reductions"][i],
                        dropout=dropout, attn_dropout=attn_dropout, drop_path=rate,
                    )
                    for rate in skipped[i]
                ],
            )
            for i, width in enumerate(self.widths)
        )  # fmt: skip
        draw_weights(self)
        draw_convolutions(self)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        lists = {"depths": [1, 1], "widths": [8, 16], "num_heads": [1, 2], "reductions": [2, 1], "mlp_ratios": [2, 2]}
        return {"img_size": 16, "preset": "tiny_32", **lists}, {}

    def published_names(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Patterns of the names in timm and the authors' code, with the names here; see `vitkit.load_weights`."""
        patterns = [(r"^patch_embed1\.", "patch_embed."), (r"\.dwconv\.dwconv\.", ".dwconv.")]
        for stage in range(len(self.widths)):
            patterns += [(rf"^block{stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1."), (rf"^norm{stage + 1}\.", f"stages.{stage}.norm.")]
            patterns += [(rf"^patch_embed{stage + 1}\.", f"stages.{stage}.downsample.")]
        return patterns

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
            yield x

    def grid_after(self, stage: int, size: tuple[int, int]) -> tuple[int, int]:
        step = self.patch_size * 2 ** (stage - 1)
        return -(-size[0] // step), -(-size[1] // step)


class PatchEmbed(nn.Module):
    """Overlapping patches through a linear map and a layer norm: `(b c h w)` → `(b ⌈h/s⌉ ⌈w/s⌉ d)` with stride s."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.norm, channels_last(self.proj(x)))


class Stage(nn.Module):
    """Overlapping patches, except in the first stage, the blocks and a norm: `(b h w d)` → `(b h w d)`."""

    def __init__(self, narrow: int | None, width: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = None if narrow is None else PatchEmbed(narrow, width, 3, 2)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.norm, self.blocks(x if self.downsample is None else self.downsample(channels_first(x))))


class ReducedAttention(nn.Module):
    """softmax(Q·Kᵀ/√d_k)·V with keys and values of a smaller map: `(b h w d)` → `(b h w d)`.

    `reduction` is how many times smaller its sides are; 0 takes the means of 7×7 parts.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int, dropout: float, proj_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.reduction, self.dropout, self.proj_dropout = num_heads, reduction, dropout, proj_dropout
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if reduction != 1:
            self.sr = nn.Conv2d(dim, dim, max(reduction, 1), stride=max(reduction, 1))
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:3]
        q = rearrange(self.q(x), "b h w (m e) -> b m (h w) e", m=self.num_heads)
        k, v = rearrange(self.kv(self._reduced(x)), "b h w (two m e) -> two b m (h w) e", two=2, m=self.num_heads)
        mixed = attend(q, k, v, self.dropout if self.training else 0.0)
        mixed = self.proj(rearrange(mixed, "b m (h w) e -> b h w (m e)", h=grid[0]))
        return F.dropout(mixed, self.proj_dropout, self.training)

    def _reduced(self, x: Tensor) -> Tensor:
        if self.reduction == 1:
            return x
        if self.reduction == 0:
            pooled = channels_last(self.sr(F.adaptive_avg_pool2d(channels_first(x), POOLED)))
            return F.gelu(normalise(self.norm, pooled))
        side = self.reduction
        rows, columns = x.shape[1] // side, x.shape[2] // side
        # Parts do not overlap, so the convolution is one matrix product, which suits CPUs better.
        parts = rearrange(x[:, : rows * side, : columns * side], "b (h p) (w q) d -> b h w (d p q)", p=side, q=side)
        return normalise(self.norm, F.linear(parts, self.sr.weight.flatten(1), self.sr.bias))


class ConvMLP(nn.Module):
    """Linear, 3×3 depthwise convolution, GELU, linear: `(b h w d)` → `(b h w d)`; `relu` puts a ReLU before the convolution."""

    def __init__(self, dim: int, hidden: int, dropout: float, *, relu: bool) -> None:
        super().__init__()
        self.dropout, self.relu = dropout, relu
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = F.gelu(channels_last(self.dwconv(channels_first(F.relu(x) if self.relu else x))))
        return F.dropout(self.fc2(F.dropout(x, self.dropout, self.training)), self.dropout, self.training)


class Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)): `(b h w d)` → `(b h w d)`."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: int, reduction: int, *, dropout: float, attn_dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = ReducedAttention(width, num_heads, reduction, attn_dropout, dropout)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = ConvMLP(width, width * mlp_ratio, dropout, relu=reduction == 0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + stochastic_depth(self.attn(normalise(self.norm1, x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(normalise(self.norm2, x)), self.drop_path, "row", self.training)
