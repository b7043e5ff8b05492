"""The transformer block: attention and an MLP, each behind a layer norm and on a residual stream."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitkit_vit import cpu_block

LAYER_NORM_EPS = 1e-6  # as in the published ViT and timm; torch's own default is 1e-5


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, softmax(Q·Kᵀ/√d_k)·V, projected back: `(b n d)` → `(b n d)`.

    With `queries` for the first tokens alone, `(b queries d)`: the others are keys and values only.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        q, k, v = self._heads(x) if queries is None else self._some_heads(x, queries)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))

    def maps(self, x: Tensor) -> Tensor:
        """The attention weights `(b heads n n)`, without dropout; rows, the queries, sum to one."""
        q, k, _ = self._heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return q, k, v

    def _some_heads(self, x: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[-1]
        q = F.linear(x[:, :queries], weight[:dim], bias[:dim])
        k, v = rearrange(F.linear(x, weight[dim:], bias[dim:]), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        return rearrange(q, "b n (h d) -> b h n d", h=self.num_heads), k, v


class MLP(nn.Module):
    """Linear, GELU, dropout, linear, dropout: `(b n d)` → `(b n d)`."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """One pre-norm transformer block: x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)).

    In training each sample skips either branch with probability `drop_path`, and what is kept is scaled by
    1/(1 − drop_path) (stochastic depth, arXiv 1603.09382). On a CPU the work is done by `cpu_block`, except with
    stochastic depth, which it does not know.

    With `queries` the output is that of the first tokens alone, `(b queries d)`, at a sixth of the block's cost where they
    are few: what a last block is asked for whose CLS token alone is looked at.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        dropout: float,
        attn_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, attn_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        if queries is None and cpu_block.suits(x) and not (self.training and self.drop_path):
            return self._on_cpu(x)
        x = x[:, :queries] + self._skip(self.attn(self.norm1(x), queries))
        return x + self._skip(self.mlp(self.norm2(x)))

    def _skip(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        keep = 1.0 - self.drop_path
        return branch * (branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep) / keep)

    def _on_cpu(self, x: Tensor) -> Tensor:
        attn, mlp = self.attn, self.mlp
        parameters = cpu_block.Parameters(
            *(self.norm1.weight, self.norm1.bias),
            *(attn.qkv.weight, attn.qkv.bias),
            *(attn.proj.weight, attn.proj.bias),
            *(self.norm2.weight, self.norm2.bias),
            *(mlp.fc1.weight, mlp.fc1.bias),
            *(mlp.fc2.weight, mlp.fc2.bias),
        )
        dropout, attn_dropout = (mlp.dropout, attn.dropout) if self.training else (0.0, 0.0)
        return cpu_block.block(x, parameters, attn.num_heads, LAYER_NORM_EPS, dropout, attn_dropout)
