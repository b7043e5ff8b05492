"""Self-attention: over all tokens, within windows of patches, or linear in the number of tokens; biases and rotations by place."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitkit_vit.products import attend, attention_weights
from vitkit_vit.windows import FORBIDDEN, from_windows, shift_mask, to_windows

Kind = Literal["softmax", "linear", "windowed"]
SPECIAL_BIASES = 3
"""Rows of a table of biases for tokens without a place: from one to any other token, from a patch to one, among them."""


@dataclass(frozen=True)
class Layout:
    """The places of the tokens of a batch: `first` tokens without a place, the patches, `last` tokens without a place.

    - `grid`: rows and columns of the image's patches.
    - `cells`: int64 `(p,)`, or `(b p)` where samples have different patches: the number of each patch in row-major order.
    - `complete`: whether `cells` counts all patches of the grid.
    - `rotation`: cosines and sines `(2 1 1 n e)` or `(2 b 1 n e)` of each token's angles, or None.
    """

    first: int
    grid: tuple[int, int]
    cells: Tensor
    last: int
    complete: bool
    rotation: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of all tokens."""
        return self.first + self.cells.shape[-1] + self.last

    def special(self) -> Tensor:
        """The numbers of the tokens without a place: int64 `(first + last,)`."""
        numbers = torch.arange(self.count, device=self.cells.device)
        return torch.cat([numbers[: self.first], numbers[self.count - self.last :]])

    def relative_rows(self) -> Tensor:
        """The row of a table of biases for each query and key: int64 `(n n)` or `(b n n)`.

        Rows run over the differences of rows and of columns, then `SPECIAL_BIASES`, in the order of BEiT (arXiv 2106.08254) and timm.
        """
        height, width = self.grid
        rows, columns = self.cells // width, self.cells % width
        rows, columns = (axis[..., :, None] - axis[..., None, :] for axis in (rows, columns))
        index = (rows + height - 1) * (2 * width - 1) + columns + width - 1
        last = (2 * height - 1) * (2 * width - 1)
        numbers = torch.arange(self.count, device=index.device)
        special = (numbers < self.first) | (numbers >= self.count - self.last)
        index = F.pad(index, (self.first, self.last), value=last + 1)
        index = F.pad(index, (0, 0, self.first, self.last), value=last)
        return index.masked_fill(special[:, None] & special, last + 2)

    def window_mask(self, window: int, shift: int) -> Tensor:
        """What is added to scores: `FORBIDDEN` between patches of different windows, else 0: `(n n)` or `(b n n)`.

        Windows begin at row and column `shift` − k·`window`.
        """
        width = self.grid[1]
        rows, columns = ((axis - shift).div(window, rounding_mode="floor") for axis in (self.cells // width, self.cells % width))
        numbers = rows * (2 * width + 2) + columns
        differ = numbers[..., :, None] != numbers[..., None, :]
        return F.pad(differ, (self.first, self.last, self.first, self.last)) * FORBIDDEN


class Attention(nn.Module):
    """Multi-head self-attention, projected back: `(b n d)` → `(b n d)`.

    - "softmax": softmax(Q·Kᵀ/√d_k + B)·V over all tokens.
    - "windowed": the same, but a patch attends only to the patches of its window of `window`×`window` patches, and to all tokens
      without a place, which attend to all tokens. Windows begin at row and column `shift`; they are cut off at the edges.
    - "linear": φ(Q)·(φ(K)ᵀ·V) / (φ(Q)·Σφ(K)) with φ(x) = elu(x) + 1, whose cost grows linearly with the number of tokens
      (Katharopoulos et al., arXiv 2006.16236), in fp32. There are no weights to drop.

    With `bias_grid`, rows and columns of the image's patches, B is learned for each head and each difference of places.
    Queries and keys are rotated if the layout has a rotation. With `queries` for the first tokens only, the result is
    `(b queries d)`: the others are keys and values. All but plain softmax need a `Layout`.
    """

    def __init__(
        self, dim: int, num_heads: int, dropout: float, *, kind: Kind = "softmax", window: int = 0, shift: int = 0,
        bias_grid: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.dropout, self.kind, self.window, self.shift = num_heads, dropout, kind, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table: nn.Parameter | None = None
        if bias_grid is not None:
            rows = (2 * bias_grid[0] - 1) * (2 * bias_grid[1] - 1) + SPECIAL_BIASES
            self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, queries: int | None = None, layout: Layout | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        q, k, v = self._heads(x, queries, layout)
        if self.kind == "linear":
            mixed = linear_attention(q, k, v)
        elif self.kind == "windowed" and layout is not None and layout.complete and queries is None:
            mixed = self._within_windows(q, k, v, layout, dropout)
        else:
            # With few queries there are few weights, and flash attention on a CPU takes as long as for all queries.
            mixed = attend(q, k, v, dropout, self._bias(layout, queries), products=queries is not None)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))

    def maps(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """The attention weights `(b heads n n)`, without dropout; each row belongs to a query and sums to one."""
        q, k, _ = self._heads(x, None, layout)
        if self.kind != "linear":
            return attention_weights(q, k, self._bias(layout, None))
        weights = features(q) @ features(k).transpose(-2, -1)
        return weights / weights.sum(dim=-1, keepdim=True)

    def _heads(self, x: Tensor, queries: int | None, layout: Layout | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(b h n e)`, rotated by their places."""
        if queries is None:
            q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        else:
            weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[-1]
            q = rearrange(F.linear(x[:, :queries], weight[:dim], bias[:dim]), "b n (h e) -> b h n e", h=self.num_heads)
            both = F.linear(x, weight[dim:], bias[dim:])
            k, v = rearrange(both, "b n (two h e) -> two b h n e", two=2, h=self.num_heads)
        if layout is not None and layout.rotation is not None:
            q, k = rotate(q, layout.rotation[..., :queries, :]), rotate(k, layout.rotation)
        return q, k, v

    def _bias(self, layout: Layout | None, queries: int | None) -> Tensor | None:
        """What is added to the scores of the first `queries` tokens: `(b h m n)`, `(h m n)` or None."""
        bias = None
        if layout is not None and self.relative_position_bias_table is not None:
            bias = self._table(layout.relative_rows()[..., :queries, :])
        if layout is not None and self.kind == "windowed":
            mask = layout.window_mask(self.window, self.shift)[..., None, :queries, :]
            bias = mask if bias is None else bias + mask
        return bias

    def _table(self, rows: Tensor) -> Tensor:
        """The biases `(... h m n)` of the table's `rows` `(... m n)`."""
        assert self.relative_position_bias_table is not None
        return self.relative_position_bias_table[rows].movedim(-1, -3)

    def _within_windows(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
        """Windowed attention of all patches of the grid without the scores between windows: `(b h n e)`."""
        window, grid, first, last = (self.window, self.window), layout.grid, layout.first, layout.last
        patches, special = slice(first, first + grid[0] * grid[1]), layout.special()
        heads, count = self.num_heads, (grid[0] // self.window) * (grid[1] // self.window)

        def cut(x: Tensor) -> Tensor:
            """Tokens `(b h n e)` → the patches of each window `(b (w h) m e)`."""
            x = rearrange(x[:, :, patches], "b h (r c) e -> b r c (h e)", r=grid[0])
            x = x.roll((-self.shift, -self.shift), dims=(1, 2)) if self.shift else x
            return rearrange(to_windows(x, window), "b w m (h e) -> b (w h) m e", h=heads)

        size = self.window**2
        bias = q.new_zeros(count, 1, size, size)
        if self.shift:
            bias = bias + shift_mask(grid, window, (self.shift, self.shift)).to(q)[:, None]
        bias = F.pad(bias, (first + last, 0))  # tokens without a place are the first keys
        everything = None
        if self.relative_position_bias_table is not None:
            rows = layout.relative_rows()
            members = to_windows(torch.arange(layout.count, device=q.device)[patches].view(1, *grid, 1), window)[0, 0, :, 0]
            keys = torch.cat([special, members])
            bias = bias + self._table(rows[members][:, keys])
            everything = self._table(rows[special])
        keys, values = cut(k), cut(v)
        if first + last:
            keys, values = (
                torch.cat([x[:, :, special].repeat(1, count, 1, 1), within], dim=2) for x, within in ((k, keys), (v, values))
            )
        mixed = attend(cut(q), keys, values, dropout, bias.expand(-1, heads, -1, -1).flatten(0, 1))
        mixed = from_windows(rearrange(mixed, "b (w h) m e -> b w m (h e)", h=heads), window, grid)
        mixed = mixed.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else mixed
        mixed = rearrange(mixed, "b r c (h e) -> b h (r c) e", h=heads)
        if not first + last:
            return mixed
        others = attend(q[:, :, special], k, v, dropout, everything, products=True)
        return torch.cat([others[:, :, :first], mixed, others[:, :, first:]], dim=2)


def features(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1 in fp32 at least: positive."""
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ(Q)·(φ(K)ᵀ·V) / (φ(Q)·Σφ(K)), in fp32 at least: queries `(b h m e)`, keys and values `(b h n e)` → `(b h m e)`."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = features(q), features(k)
        mixed = q @ (k.transpose(-2, -1) @ v.to(k.dtype))
        return (mixed / (q @ k.sum(dim=-2, keepdim=True).transpose(-2, -1)).clamp(min=1e-6)).to(v.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of dimensions (i, i + e/2) of `(b h n e)` by its angle; `rotation` holds cosines and sines `(2 ... n e)`."""
    cosines, sines = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


__all__ = ["Attention", "Kind", "Layout", "linear_attention", "rotate"]
