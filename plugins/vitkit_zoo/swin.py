"""The Swin transformer (Liu et al., Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from vitkit_vit import MLP, attend, from_windows, normalise, relative_index, resize_table, shift_mask, to_windows
from vitkit_zoo.pyramid import (
    Pyramid,
    channels_last,
    check_heads,
    check_size,
    check_sizes,
    chosen,
    draw_weights,
    image_size,
    rates,
)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny_32": {"patch_size": 2, "window": 4, "embed_dim": 32, "depths": (2, 2, 2), "num_heads": (2, 4, 8)},
    "small_32": {"patch_size": 2, "window": 4, "embed_dim": 48, "depths": (2, 2, 4), "num_heads": (3, 6, 12)},
    "base_32": {"patch_size": 2, "window": 4, "embed_dim": 96, "depths": (2, 4, 2), "num_heads": (3, 6, 12)},
    "tiny": {"patch_size": 4, "window": 7, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"patch_size": 4, "window": 7, "embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"patch_size": 4, "window": 7, "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"patch_size": 4, "window": 7, "embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
TABLE = "relative_position_bias_table"


class Swin(Pyramid):
    """Swin transformer: images `(b c h w)` → tokens `(b n d)` after the last layer norm.

    Patches of `patch_size` pixels become tokens. Each stage but the first merges 2×2 tokens into one with twice as many
    channels, and has `depths[i]` pre-norm blocks. Attention is within windows of `window`×`window` tokens, with a learned
    bias for each head and each difference of rows and columns. Every second block shifts the windows by half of their side.

    | preset   | for images of   | patch_size | window | embed_dim | depths      | num_heads    | parameters  |
    |----------|-----------------|------------|--------|-----------|-------------|--------------|-------------|
    | tiny_32  | 28 to 64 pixels | 2          | 4      | 32        | 2, 2, 2     | 2, 4, 8      | 565,756     |
    | small_32 | 28 to 64 pixels | 2          | 4      | 48        | 2, 2, 4     | 3, 6, 12     | 2,157,330   |
    | base_32  | 28 to 64 pixels | 2          | 4      | 96        | 2, 4, 2     | 3, 6, 12     | 5,927,862   |
    | tiny     | 224 pixels      | 4          | 7      | 96        | 2, 2, 6, 2  | 3, 6, 12, 24 | 27,519,354  |
    | small    | 224 pixels      | 4          | 7      | 96        | 2, 2, 18, 2 | 3, 6, 12, 24 | 48,837,258  |
    | base     | 224 pixels      | 4          | 7      | 128       | 2, 2, 18, 2 | 4, 8, 16, 32 | 86,743,224  |
    | large    | 224 pixels      | 4          | 7      | 192       | 2, 2, 18, 2 | 6, 12, 24, 48 | 194,995,476 |

    The other arguments replace the preset's. `embed_dim` is the width of the first stage; the attribute `embed_dim` is that
    of the tokens, the last stage's.

    - `img_size`: the size of the training images. A map that is smaller than the window at this size makes the window as small, as in
      the published code and in timm. Images of other sizes are taken, too.
    - `dropout`: the probability in [0, 1) that a channel is dropped after the GELU and after the MLP; `attn_dropout` that an
      attention weight is. `drop_path`: that a sample skips a branch of the last block, growing linearly from 0 at the first.

    Maps that windows do not divide are padded with zeros behind the norm, and maps of an odd side before merging, as in the
    published code for detection and in torchvision; padded positions take part in attention. timm shifts before it pads, so
    that opposite edges see each other; its outputs differ there. Parameters are named as timm names them;
    `vitkit.load_weights` also reads the names of torchvision and of the authors. Weights are drawn from Normal(0, 0.02),
    cut off at two units, biases are zero. Raises `UsageError` for arguments that do not fit each other.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        preset: Literal["tiny_32", "small_32", "base_32", "tiny", "small", "base", "large"] = "small_32",
        patch_size: int | None = None,
        window: int | None = None,
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        values = chosen(
            PRESETS, preset, patch_size=patch_size, window=window, embed_dim=embed_dim, depths=depths, num_heads=num_heads
        )
        check_sizes(in_chans=in_chans, drop_path=drop_path, dropout=dropout, attn_dropout=attn_dropout, **values)
        depths, num_heads = values["depths"], values["num_heads"]
        self.widths = tuple(values["embed_dim"] * 2**i for i in range(len(depths)))
        check_heads(self.widths, num_heads)
        self.in_chans, self.img_size, self.patch_size = in_chans, image_size(img_size), values["patch_size"]
        self.embed_dim = self.widths[-1]
        self.least_size = (self.patch_size, self.patch_size)
        check_size("Swin", self.img_size, self.least_size)
        self.patch_embed = PatchEmbed(in_chans, self.widths[0], self.patch_size)
        skipped = rates(drop_path, depths)
        self.layers = nn.ModuleList(
            Stage(
                width,
                [
                    Block(
                        width, heads, self.grid_after(number, self.img_size), values["window"], shifted=place % 2 == 1,
                        mlp_ratio=mlp_ratio, dropout=dropout, attn_dropout=attn_dropout, drop_path=rate,
                    )
                    for place, rate in enumerate(skipped[number - 1])
                ],
                first=number == 1,
            )
            for number, (width, heads) in enumerate(zip(self.widths, num_heads, strict=True), start=1)
        )  # fmt: skip
        self.norm = nn.LayerNorm(self.embed_dim)
        draw_weights(self)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"img_size": 16, "preset": "tiny_32", "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}, {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay: the tables of biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(TABLE)}

    def published_names(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Patterns of the names in timm, torchvision and the authors' code, with the names here; see `vitkit.load_weights`."""
        patterns = [(r"^features\.0\.0\.", "patch_embed.proj."), (r"^features\.0\.2\.", "patch_embed.norm.")]
        if any(name.startswith("layers.0.downsample.") for name in names):  # the authors merge at the end of a stage
            patterns += [(rf"^layers\.{i}\.downsample\.", f"layers.{i + 1}.downsample.") for i in reversed(range(len(self.widths)))]
        for stage in range(len(self.widths)):
            patterns += [(rf"^features\.{2 * stage + 1}\.(\d+)\.", rf"layers.{stage}.blocks.\1.")]
            patterns += [(rf"^features\.{2 * stage}\.", f"layers.{stage}.downsample.")]
        return [*patterns, (r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.3\.", ".mlp.fc2.")]

    def fit_weight(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """A table of biases for windows of another size; None for other weights. See `vitkit.load_weights`."""
        side = (round(len(value) ** 0.5) + 1) // 2
        if not name.endswith(TABLE) or value.ndim != 2 or (2 * side - 1) ** 2 != len(value):
            return None
        block = self.get_submodule(re.sub(rf"\.attn\.{TABLE}$", "", name))
        assert isinstance(block, Block)
        return resize_table(value, (side, side), block.window), "resized to the window"

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
            yield x

    def grid_after(self, stage: int, size: tuple[int, int]) -> tuple[int, int]:
        step = 2 ** (stage - 1)
        rows, columns = (-(-(side // self.patch_size) // step) for side in size)
        return rows, columns

    def finish(self, x: Tensor) -> Tensor:
        return normalise(self.norm, x)


class PatchEmbed(nn.Module):
    """Patches through a linear map and a layer norm: images `(b c h w)` → `(b ⌊h/p⌋ ⌊w/p⌋ d)`."""

    def __init__(self, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.norm, channels_last(self.proj(x.contiguous(memory_format=torch.channels_last))))


class Stage(nn.Module):
    """Patch merging, except in the first stage, and the blocks: `(b h w d)` → `(b h/2 w/2 2·d)`."""

    def __init__(self, width: int, blocks: Sequence["Block"], *, first: bool) -> None:
        super().__init__()
        self.downsample = None if first else PatchMerging(width // 2)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x if self.downsample is None else self.downsample(x))


class PatchMerging(nn.Module):
    """2×2 tokens, concatenated column by column, through a norm and a linear map: `(b h w d)` → `(b ⌈h/2⌉ ⌈w/2⌉ 2·d)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.reduction(normalise(self.norm, rearrange(x, "b (h u) (w v) d -> b h w (v u d)", u=2, v=2)))


class WindowAttention(nn.Module):
    """Attention within each window, with a learned bias for each difference of positions: `(b p n d)` → `(b p n d)`."""

    index: Tensor

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", relative_index(window).flatten(), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, n = x.shape[1:3]
        # Windows lie in the dimension of the heads, so that one bias serves every sample without a copy.
        q, k, v = rearrange(self.qkv(x), "b p n (three h e) -> three b (p h) n e", three=3, h=self.num_heads)
        bias = self.relative_position_bias_table[self.index].view(n, n, -1).permute(2, 0, 1)  # (h n n)
        bias = bias.expand(windows, -1, -1, -1) if mask is None else bias + mask[:, None].to(bias.dtype)
        mixed = attend(q, k, v, self.dropout if self.training else 0.0, bias.flatten(0, 1))
        return self.proj(rearrange(mixed, "b (p h) n e -> b p n (h e)", p=windows))


class Block(nn.Module):
    """x + Attention(LayerNorm(x)) within windows, then x + MLP(LayerNorm(x)): `(b h w d)` → `(b h w d)`."""

    mask: Tensor | None

    def __init__(
        self, width: int, num_heads: int, grid: tuple[int, int], window: int, *, shifted: bool, mlp_ratio: float, dropout: float,
        attn_dropout: float, drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid, self.drop_path = grid, drop_path
        self.window = (min(grid[0], window), min(grid[1], window))
        self.shift = (self.window[0] // 2, self.window[1] // 2) if shifted else (0, 0)
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, num_heads, self.window, attn_dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)
        self.register_buffer("mask", self._mask(self._padded(grid)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + stochastic_depth(self._attend(normalise(self.norm1, x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(normalise(self.norm2, x)), self.drop_path, "row", self.training)

    def _attend(self, x: Tensor) -> Tensor:
        grid = rows, columns = x.shape[1], x.shape[2]
        padded = self._padded(grid)
        if padded != grid:
            x = F.pad(x, (0, 0, 0, padded[1] - columns, 0, padded[0] - rows))
        mask = self.mask if grid == self.grid else self._mask(padded)
        shift = self._shift(padded)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        x = self.attn(to_windows(x, self.window), None if mask is None else mask.to(x.device))
        x = from_windows(x, self.window, padded)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x if padded == grid else x[:, :rows, :columns]

    def _padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the smallest map that holds `grid` and that windows divide."""
        return -(-grid[0] // self.window[0]) * self.window[0], -(-grid[1] // self.window[1]) * self.window[1]

    def _shift(self, padded: tuple[int, int]) -> tuple[int, int]:
        """The shift of a padded map: none along a side that is one window."""
        rows, columns = (0 if side <= width else step for side, width, step in zip(padded, self.window, self.shift, strict=True))
        return rows, columns

    def _mask(self, padded: tuple[int, int]) -> Tensor | None:
        shift = self._shift(padded)
        return shift_mask(padded, self.window, shift) if any(shift) else None
