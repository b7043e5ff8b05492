"""MobileViT (Mehta and Rastegari, Light-weight, General-purpose, and Mobile-friendly Vision Transformer, arXiv 2110.02178)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from vitkit.distributed import BatchNorm
from vitkit.validation import at_least
from vitkit_vit import attend, normalise
from vitkit_zoo.pyramid import (
    Pyramid,
    channels_first,
    channels_last,
    check_heads,
    check_size,
    check_sizes,
    chosen,
    image_size,
)

PUBLISHED: dict[str, Any] = {"blocks": (1, 3, 1, 1, 1), "depths": (0, 0, 2, 4, 3), "strides": (1, 2, 2, 2, 2)}
SMALL: dict[str, Any] = {"blocks": (1, 1, 1, 1), "depths": (0, 0, 2, 2), "strides": (1, 1, 2, 2), "expansion": 2, "stem": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny_32": SMALL | {"widths": (16, 24, 48, 64), "dims": (0, 0, 64, 96), "features": 256},
    "small_32": SMALL | {"widths": (32, 48, 80, 112), "dims": (0, 0, 128, 192), "features": 384, "depths": (0, 0, 2, 3)},
    "base_32": SMALL | {"widths": (32, 64, 112, 160), "dims": (0, 0, 192, 288), "features": 512, "depths": (0, 0, 3, 5)},
    "xxs": PUBLISHED | {"widths": (16, 24, 48, 64, 80), "dims": (0, 0, 64, 80, 96), "expansion": 2, "stem": 16, "features": 320},
    "xs": PUBLISHED | {"widths": (32, 48, 64, 80, 96), "dims": (0, 0, 96, 120, 144), "expansion": 4, "stem": 16, "features": 384},
    "s": PUBLISHED | {"widths": (32, 64, 96, 128, 160), "dims": (0, 0, 144, 192, 240), "expansion": 4, "stem": 16, "features": 640},
}
HEADS = 4
MLP_RATIO = 2
PATCH = 2


class MobileViT(Pyramid):
    """MobileViT: images `(b c h w)` → tokens `(b n d)`, the positions of the last feature map.

    A 3×3 convolution of stride 2 begins. Stage i has `blocks[i]` inverted residual blocks (1×1, depthwise 3×3, 1×1, with `expansion`
    times as many channels within), of which the first has stride `strides[i]`. With `depths[i]` > 0 a MobileViT block follows: a 3×3
    and a 1×1 convolution to `dims[i]` channels; `depths[i]` transformer blocks of 4 heads, in which a position attends to the
    positions at the same place of every 2×2 patch; a 1×1 convolution back, and a 3×3 convolution of this and the block's input. A
    1×1 convolution to `features` channels ends. Every convolution but the one to `dims[i]` has a batch norm.

    | preset   | for images of   | widths               | dims              | depths           | strides       | features | parameters |
    |----------|-----------------|----------------------|-------------------|------------------|---------------|----------|------------|
    | tiny_32  | 28 to 64 pixels | 16, 24, 48, 64       | 0, 0, 64, 96      | 0, 0, 2, 2       | 1, 1, 2, 2    | 256      | 445,616    |
    | small_32 | 28 to 64 pixels | 32, 48, 80, 112      | 0, 0, 128, 192    | 0, 0, 2, 3       | 1, 1, 2, 2    | 384      | 1,831,824  |
    | base_32  | 28 to 64 pixels | 32, 64, 112, 160     | 0, 0, 192, 288    | 0, 0, 3, 5       | 1, 1, 2, 2    | 512      | 5,573,424  |
    | xxs      | 256 pixels      | 16, 24, 48, 64, 80   | 0, 0, 64, 80, 96  | 0, 0, 2, 4, 3    | 1, 2, 2, 2, 2 | 320      | 951,024    |
    | xs       | 256 pixels      | 32, 48, 64, 80, 96   | 0, 0, 96, 120, 144 | 0, 0, 2, 4, 3   | 1, 2, 2, 2, 2 | 384      | 1,932,848  |
    | s        | 256 pixels      | 32, 64, 96, 128, 160 | 0, 0, 144, 192, 240 | 0, 0, 2, 4, 3  | 1, 2, 2, 2, 2 | 640      | 4,937,632  |

    The other arguments replace the preset's.

    - `drop_path`: the probability in [0, 1) that a sample skips a branch of a transformer block or an inverted residual block.
    - `dropout`: that a channel is dropped after attention and in the MLP; `attn_dropout` that an attention weight is.

    As in the published code, a map that 2×2 patches do not divide is resampled to one that they divide, and back. Batch norm is
    over the batches of all ranks. Parameters are named as timm names them. Convolutions are drawn by Kaiming's rule (fan-out),
    linear weights from Normal(0, 0.02), biases are zero. Raises `UsageError` for arguments that do not fit each other.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        preset: Literal["tiny_32", "small_32", "base_32", "xxs", "xs", "s"] = "small_32",
        widths: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        expansion: int | None = None,
        stem: int | None = None,
        features: int | None = None,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        values = chosen(
            PRESETS, preset, widths=widths, dims=dims, depths=depths, blocks=blocks, strides=strides, expansion=expansion, stem=stem,
            features=features,
        )  # fmt: skip
        counts = {name: value for name, value in values.items() if name not in ("dims", "depths")}
        check_sizes(in_chans=in_chans, drop_path=drop_path, dropout=dropout, attn_dropout=attn_dropout, **counts)
        for depth, dim in zip(values["depths"], values["dims"], strict=True):
            at_least(0, depths=depth)
            at_least(1 if depth else 0, dims=dim)
        check_heads([dim or HEADS for dim in values["dims"]], [HEADS] * len(values["dims"]))
        self.in_chans, self.img_size, self.strides = in_chans, image_size(img_size), values["strides"]
        self.embed_dim = values["features"]
        self.widths = (*values["widths"][:-1], self.embed_dim)
        self.least_size = (2, 2)
        check_size("MobileViT", self.img_size, self.least_size)
        self.stem = ConvNorm(in_chans, values["stem"], 3, stride=2)
        self.stages = nn.ModuleList()
        narrow = values["stem"]
        noise = {"dropout": dropout, "attn_dropout": attn_dropout, "drop_path": drop_path}
        for width, dim, depth, count, stride in zip(
            *(values[name] for name in ("widths", "dims", "depths", "blocks", "strides")), strict=True
        ):
            stage = nn.Sequential()
            for number in range(count):
                stage.append(InvertedResidual(narrow, width, 1 if number else stride, values["expansion"], drop_path))
                narrow = width
            if depth:
                stage.append(MobileViTBlock(width, dim, depth, **noise))
            self.stages.append(stage)
        self.final_conv = ConvNorm(narrow, self.embed_dim, 1)
        self._draw()

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        lists = {"widths": [8, 8], "dims": [0, 8], "depths": [0, 1], "blocks": [1, 1], "strides": [1, 2]}
        return {"img_size": 16, "preset": "tiny_32", "stem": 8, "features": 16, **lists}, {}

    def published_names(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Patterns of the names in timm with the names here: they are equal. See `vitkit.load_weights`."""
        return []

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stem(channels_last(x.contiguous(memory_format=torch.channels_last)))
        for stage in self.stages:
            x = stage(x)
            yield x

    def grid_after(self, stage: int, size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = size
        for stride in (2, *self.strides[:stage]):
            rows, columns = -(-rows // stride), -(-columns // stride)
        return rows, columns

    def finish(self, x: Tensor) -> Tensor:
        return self.final_conv(x)

    def _draw(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class ConvNorm(nn.Module):
    """A convolution, batch norm over all ranks and, with `act`, SiLU: `(b h w c)` → `(b h w d)`."""

    def __init__(self, channels: int, width: int, kernel: int, *, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.act = act
        self.conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = convolved(self.conv, x)
        x = self.bn(x.flatten(0, 2)).view(x.shape)
        return F.silu(x, inplace=True) if self.act else x


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map `(b h w c)` → `(b h w d)`; one of 1×1 as a matrix product."""
    if conv.kernel_size == (1, 1) and conv.groups == 1 and conv.bias is None:
        return F.linear(x, conv.weight.flatten(1))
    return channels_last(conv(channels_first(x)))


class InvertedResidual(nn.Module):
    """1×1 to more channels, depthwise 3×3, 1×1 back without activation: `(b h w c)` → `(b h/s w/s d)`; plus the input if shapes agree."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int, drop_path: float) -> None:
        super().__init__()
        hidden = divisible(channels * expansion)
        self.drop_path, self.residual = drop_path, stride == 1 and channels == width
        self.conv1_1x1 = ConvNorm(channels, hidden, 1)
        self.conv2_kxk = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv3_1x1 = ConvNorm(hidden, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + stochastic_depth(branch, self.drop_path, "row", self.training) if self.residual else branch


def divisible(channels: int, divisor: int = 8) -> int:
    """The multiple of `divisor` that is nearest to `channels`, and at least 0.9 times as large."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


class MobileViTBlock(nn.Module):
    """Convolutions around transformer blocks in which equal places of all patches attend to each other: `(b h w c)` → `(b h w c)`."""

    def __init__(self, channels: int, dim: int, depth: int, *, dropout: float, attn_dropout: float, drop_path: float) -> None:
        super().__init__()
        self.conv_kxk = ConvNorm(channels, channels, 3)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(*(Block(dim, dropout, attn_dropout, drop_path) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = ConvNorm(dim, channels, 1)
        self.conv_fusion = ConvNorm(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = convolved(self.conv_1x1, self.conv_kxk(x))
        rows, columns = inner.shape[1:3]
        grid = (math.ceil(rows / PATCH), math.ceil(columns / PATCH))
        resampled = (grid[0] * PATCH, grid[1] * PATCH) != (rows, columns)
        if resampled:
            inner = resized(inner, (grid[0] * PATCH, grid[1] * PATCH))
        places = rearrange(inner, "b (h u) (w v) d -> b (u v) (h w) d", u=PATCH, v=PATCH)  # (b places patches d)
        places = normalise(self.norm, self.transformer(places))
        inner = rearrange(places, "b (u v) (h w) d -> b (h u) (w v) d", u=PATCH, h=grid[0])
        if resampled:
            inner = resized(inner, (rows, columns))
        return self.conv_fusion(torch.cat([x, self.conv_proj(inner)], dim=-1))


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map `(b h w d)`, resampled bilinearly to `size`."""
    return channels_last(F.interpolate(channels_first(x), size=size, mode="bilinear", align_corners=False))


class Attention(nn.Module):
    """Attention among the patches at each place: `(b places patches d)` → `(b places patches d)`."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b p n (three h e) -> three b (p h) n e", three=3, h=HEADS)
        mixed = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.proj(rearrange(mixed, "b (p h) n e -> b p n (h e)", h=HEADS))


class MLP(nn.Module):
    """Linear, SiLU, linear: `(... d)` → `(... d)`."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.silu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)): `(b places patches d)` → the same shape."""

    def __init__(self, dim: int, dropout: float, attn_dropout: float, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path = dropout, drop_path
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, attn_dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim, MLP_RATIO * dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.dropout(self.attn(normalise(self.norm1, x)), self.dropout, self.training)
        x = x + stochastic_depth(mixed, self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(normalise(self.norm2, x)), self.drop_path, "row", self.training)
