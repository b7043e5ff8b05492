"""The compact convolutional transformer (Hassani et al., Escaping the Big Data Paradigm with Compact Transformers, arXiv 2104.05704)."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from vitkit.errors import UsageError
from vitkit.models import resample_positions
from vitkit.validation import one_of
from vitkit_vit import MLP, attend, attention_weights, drop, gather_tokens, join_tokens, normalise
from vitkit_zoo.pyramid import check_heads, check_sizes, image_size

STEM_WIDTH = 64
"""Channels between two convolutions of the tokenizer."""
PRESETS: dict[str, dict[str, int]] = {
    "2_3x2": {"depth": 2, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 1, "kernel": 3, "convolutions": 2},
    "4_3x2": {"depth": 4, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 1, "kernel": 3, "convolutions": 2},
    "6_3x1": {"depth": 6, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2, "kernel": 3, "convolutions": 1},
    "6_3x2": {"depth": 6, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2, "kernel": 3, "convolutions": 2},
    "7_3x1": {"depth": 7, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2, "kernel": 3, "convolutions": 1},
    "7_3x2": {"depth": 7, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2, "kernel": 3, "convolutions": 2},
    "7_7x2": {"depth": 7, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2, "kernel": 7, "convolutions": 2},
    "14_7x2": {"depth": 14, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 3, "kernel": 7, "convolutions": 2},
}


class CCT(nn.Module):
    """Compact convolutional transformer: images `(b c h w)` → tokens `(b n d)` after the last layer norm.

    The tokenizer has `convolutions` times a convolution without bias, ReLU and a max pooling of 3×3 with stride 2. Its positions are
    the tokens; extra tokens follow. A block is y = LayerNorm(x + Attention(LayerNorm(x))), then y + MLP(y). `encode_image` pools the
    sequence: the mean of all tokens with the weights softmax(w·t + c) over the tokens t.

    The names of presets are the published ones: "7_3x1" has 7 blocks and one 3×3 convolution. Parameters without classifier, which
    adds (`embed_dim` + 1)·classes:

    | preset | for images of | depth | embed_dim | num_heads | mlp_ratio | tokens | parameters |
    |--------|---------------|-------|-----------|-----------|-----------|--------|------------|
    | 2_3x2  | 32 pixels     | 2     | 128       | 2         | 1         | 64     | 282,433    |
    | 4_3x2  | 32 pixels     | 4     | 128       | 2         | 1         | 64     | 480,833    |
    | 6_3x1  | 32 pixels     | 6     | 256       | 4         | 2         | 256    | 3,231,233  |
    | 6_3x2  | 32 pixels     | 6     | 256       | 4         | 2         | 64     | 3,324,353  |
    | 7_3x1  | 32 pixels     | 7     | 256       | 4         | 2         | 256    | 3,757,569  |
    | 7_3x2  | 32 pixels     | 7     | 256       | 4         | 2         | 64     | 3,850,689  |
    | 7_7x2  | 224 pixels    | 7     | 256       | 4         | 2         | 196    | 4,547,521  |
    | 14_7x2 | 224 pixels    | 14    | 384       | 6         | 3         | 196    | 21,982,273 |

    The other arguments replace the preset's.

    - `kernel`: side of the convolutions; their stride is max(1, kernel // 2 − 1).
    - `positions`: learned; or fixed sines and cosines of a token's number ("sine"), sines at even dimensions; or none.
    - `dropout`: the probability in [0, 1) that a channel of a token is dropped at the start, after attention and in the MLP; `attn_dropout`
      that an attention weight is. `drop_path`: that a sample skips a branch of the last block, growing linearly from 0 at the first.

    `vitkit.load_weights` reads the published names and resamples positions to another grid. Linear weights are drawn from
    Normal(0, 0.02), cut off at two units, convolutions by Kaiming's rule, positions from Normal(0, 0.2); biases are zero. Raises
    `UsageError` for arguments that do not fit each other and images of another shape.
    """

    positional_emb: Tensor | None

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        preset: Literal["2_3x2", "4_3x2", "6_3x1", "6_3x2", "7_3x1", "7_3x2", "7_7x2", "14_7x2"] = "7_3x1",
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: int | None = None,
        kernel: int | None = None,
        convolutions: int | None = None,
        positions: Literal["learned", "sine", "none"] = "learned",
        dropout: float = 0.0,
        attn_dropout: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        one_of(PRESETS, preset=preset)
        one_of(("learned", "sine", "none"), positions=positions)
        given = {
            "depth": depth, "embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "kernel": kernel,
            "convolutions": convolutions,
        }  # fmt: skip
        values = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        check_sizes(in_chans=in_chans, drop_path=drop_path, dropout=dropout, attn_dropout=attn_dropout, **values)
        check_heads([values["embed_dim"]], [values["num_heads"]])
        depth, width = values["depth"], values["embed_dim"]
        self.img_size, self.in_chans, self.embed_dim, self.dropout = image_size(img_size), in_chans, width, dropout
        self.num_prefix_tokens = 0
        self.tokenizer = Tokenizer(in_chans, width, values["kernel"], values["convolutions"])
        self.grid_size = self.tokenizer.grid(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if self.num_patches < 1:
            raise UsageError(
                f"images of {self.img_size[0]}×{self.img_size[1]} pixels leave no token; resize them, or take fewer convolutions"
            )
        self.attention_pool = nn.Linear(width, 1)
        if positions == "learned":
            self.positional_emb = nn.Parameter(torch.empty(1, self.num_patches, width))
            nn.init.trunc_normal_(self.positional_emb, std=0.2)
        else:
            codes = sines(self.num_patches, width)[None] if positions == "sine" else None
            self.register_buffer("positional_emb", codes, persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(width, values["num_heads"], values["mlp_ratio"], dropout, attn_dropout, drop_path * number / max(depth - 1, 1))
                for number in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"img_size": 8, "preset": "2_3x2", "embed_dim": 16, "num_heads": 2}, {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay: positions."""
        return {"positional_emb"}

    def published_names(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Patterns of the published names with the names here; see `vitkit.load_weights`."""
        patterns = [(r"^classifier\.", ""), (r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"tokenizer.convs.\1.")]
        patterns += [(r"\.norm1\.", ".norm2."), (r"\.pre_norm\.", ".norm1."), (r"\.self_attn\.", ".attn.")]
        published = any(".self_attn." in name for name in names)
        return [*patterns, (r"\.linear1\.", ".mlp.fc1."), (r"\.linear2\.", ".mlp.fc2.")] if published else []

    def fit_weight(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """Positions of a square grid, resampled to this one; None for other weights. See `vitkit.load_weights`."""
        side = round(value.shape[1] ** 0.5) if value.ndim == 3 else 0
        if name != "positional_emb" or side * side != value.shape[1]:
            return None
        return resample_positions(value, (side, side), self.grid_size), "resampled"

    def forward(self, x: Tensor | None, *, extra_tokens: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Images `(b c h w)` → tokens `(b n d)`; arguments as for `vit`.

        With `x` None there are only `extra_tokens` `(b m d)`, or `(1 m d)` for every sample. `keep` `(b k)` int64 names the tokens of the
        image that enter the blocks, in [0, num_patches).
        """
        return self._normed(self.blocks(self._embed(x, extra_tokens, keep)))

    def encode_image(self, x: Tensor | None, *, extra_tokens: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Images `(b c h w)` → pooled features `(b d)`; arguments as for `forward`."""
        return self.pool(self(x, extra_tokens=extra_tokens, keep=keep))

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens `(b n d)` → `(b d)`: their mean with the weights softmax(w·t + c)."""
        weights = self.attention_pool(tokens).float().softmax(dim=1).to(tokens.dtype)  # (b n 1)
        return (weights.transpose(1, 2) @ tokens)[:, 0].to(tokens.dtype)

    def forward_features(self, x: Tensor | None, depths: Sequence[int], *, extra_tokens: Tensor | None = None) -> list[Tensor]:
        """Tokens `(b n d)` behind each number of blocks in `depths`, 1 … depth, and through the last norm.

        Raises `UsageError` for other depths.
        """
        wrong = [depth for depth in depths if not 1 <= depth <= len(self.blocks)]
        if wrong:
            raise UsageError(f"depths {wrong} lie outside 1 … {len(self.blocks)}, the number of blocks")
        tokens, features = self._embed(x, extra_tokens, None), {}
        for number, block in enumerate(self.blocks[: max(depths, default=0)], start=1):
            tokens = block(tokens)
            if number in depths:
                features[number] = self._normed(tokens)
        return [features[depth] for depth in depths]

    def attention_maps(self, x: Tensor | None, *, extra_tokens: Tensor | None = None) -> Tensor:
        """The attention weights `(b depth heads n n)` of every block; each row, a query's, sums to one."""
        tokens, maps = self._embed(x, extra_tokens, None), []
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, _ = block.attn.heads(block.norm1(tokens))
            maps.append(attention_weights(q, k))
            tokens = block(tokens)
        return torch.stack(maps, dim=1)

    def _embed(self, x: Tensor | None, extra_tokens: Tensor | None, keep: Tensor | None) -> Tensor:
        patches = None if x is None else self._patches(x, keep)
        return drop(join_tokens([], patches, extra_tokens, keep, self.embed_dim), self.dropout if self.training else 0.0)

    def _patches(self, x: Tensor, keep: Tensor | None) -> Tensor:
        expected = (self.in_chans, *self.img_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise UsageError(
                f"images are {tuple(x.shape)}, expected (batch, {', '.join(map(str, expected))}); resize them, or "
                f"build the CCT with their img_size and in_chans"
            )
        patches = self.tokenizer(x)
        if self.positional_emb is not None:
            patches = patches + self.positional_emb
        return patches if keep is None else gather_tokens(patches, keep)

    def _normed(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens.to(self.norm.weight.dtype))  # blocks leave them in autocast's dtype


def sines(count: int, dim: int) -> Tensor:
    """Codes `(count dim)`: sin(p·ω_i) at dimension 2i and cos(p·ω_i) at 2i + 1, with ω_i = 10000^(−2i/dim)."""
    angles = torch.arange(count, dtype=torch.float64)[:, None] * 10000.0 ** (-2 * (torch.arange(dim) // 2) / dim)
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos()).float()


class Tokenizer(nn.Module):
    """Convolutions, each with ReLU and a max pooling of stride 2: images `(b c h w)` → tokens `(b n d)`."""

    def __init__(self, in_chans: int, width: int, kernel: int, count: int) -> None:
        super().__init__()
        channels = [in_chans, *[STEM_WIDTH] * (count - 1), width]
        self.stride, self.padding, self.kernel = max(1, kernel // 2 - 1), max(1, kernel // 2), kernel
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], kernel, stride=self.stride, padding=self.padding, bias=False) for i in range(count)
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 3, stride=2, padding=1)
        return x.flatten(2).transpose(1, 2)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of `size` pixels."""
        rows, columns = size
        for _ in self.convs:
            rows, columns = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in (rows, columns))
            rows, columns = (rows - 1) // 2 + 1, (columns - 1) // 2 + 1
        return rows, columns


class Attention(nn.Module):
    """Multi-head self-attention without biases of queries, keys and values: `(b n d)` → `(b n d)`."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed = attend(*self.heads(x), self.dropout if self.training else 0.0)
        return self.proj(rearrange(mixed, "b h n e -> b n (h e)"))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(b h n e)`."""
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        return q, k, v


class Block(nn.Module):
    """y = LayerNorm(x + Attention(LayerNorm(x))), then y + MLP(y): `(b n d)` → `(b n d)`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, dropout: float, attn_dropout: float, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path = dropout, drop_path
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads, attn_dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim, mlp_ratio * dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        mixed = drop(self.attn(normalise(self.norm1, x)), self.dropout if self.training else 0.0)
        x = normalise(self.norm2, x + stochastic_depth(mixed, self.drop_path, "row", self.training))
        return x + stochastic_depth(self.mlp(x), self.drop_path, "row", self.training)
