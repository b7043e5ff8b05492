"""The transformer block: attention and an MLP, each after a layer norm and on a residual stream."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6  # as in the published ViT and timm; torch's own default is 1e-5
LONGEST_TOKENS = 512
"""Above this length the attention weights are larger than all other activations, and flash attention pays on a CPU too."""
DROPOUT_LEVELS = 2**15
"""On a CPU a dropout probability is rounded to a multiple of 1 / 2¹⁵."""


def products_are_faster(q: Tensor, dropout: float) -> bool:
    """True if attention as two batched products trains faster than `scaled_dot_product_attention`, for heads `(b h n d)`.

    That is on a CPU in reduced precision or with dropout. Forward and backward of a block without dropout, processor time,
    one core of an AMD EPYC (Zen 4), torch 2.14; torch's operation takes this many times as long:

    | tokens, width | fp32, AVX-512 | fp32, AVX2 | bf16, AVX512-BF16 |
    |---|---|---|---|
    | 17, 128 | 1.01 | 0.97 | 1.76 |
    | 17, 192 | 0.99 | 1.01 | 1.60 |
    | 65, 128 | 0.97 | 0.99 | 1.66 |
    | 65, 192 | 0.97 | 0.98 | 1.53 |

    With a dropout of 0.1 it takes 0.99 to 1.20 times as long.
    """
    if q.device.type != "cpu" or q.shape[-2] > LONGEST_TOKENS or torch.compiler.is_exporting():
        return False
    return q.dtype == torch.bfloat16 or dropout > 0


def normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """`norm(x)` for tokens `(b n d)`.

    In bf16 on a CPU, scale and shift are applied separately: torch's backward pass adds up their gradients in bf16 there, which is
    wrong by 20 % over 132 rows, and by more over more.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return norm(x)
    plain = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return torch.addcmul(norm.bias.to(x.dtype), plain, norm.weight.to(x.dtype))


def drop(x: Tensor, probability: float) -> Tensor:
    """Dropout: zero with `probability`, else x / (1 − probability).

    torch draws one random number an element on a CPU, which takes longer than the matrix product before it. Here one draw of
    63 bits serves four elements: 2.3 times as fast on an AMD EPYC (Zen 4).
    """
    if not probability or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_().view(torch.int16)[: x.numel()]
    kept = draws.bitwise_and_(DROPOUT_LEVELS - 1) >= round(probability * DROPOUT_LEVELS)
    return x * kept.view(x.shape).to(x.dtype).mul_(1 / (1 - probability))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, softmax(Q·Kᵀ/√d_k)·V, projected back: `(b n d)` → `(b n d)`.

    With `queries` for the first tokens only, `(b queries d)`: the others are keys and values.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        q, k, v = self._heads(x) if queries is None else self._some_heads(x, queries)
        # With few queries there are few weights, and flash attention on a CPU takes as long as for all queries.
        mixed = attend(q, k, v, dropout, products=queries is not None)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))

    def maps(self, x: Tensor) -> Tensor:
        """The attention weights `(b heads n n)`, without dropout; each row belongs to a query and sums to one."""
        q, k, _ = self._heads(x)
        return attention_weights(q, k)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return q, k, v

    def _some_heads(self, x: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[-1]
        q = F.linear(x[:, :queries], weight[:dim], bias[:dim])
        k, v = rearrange(F.linear(x, weight[dim:], bias[dim:]), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        return rearrange(q, "b n (h d) -> b h n d", h=self.num_heads), k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Tensor | None = None, *, products: bool = False
) -> Tensor:
    """softmax(Q·Kᵀ/√d_k + bias)·V by the faster way: queries `(b h m d)`, keys and values `(b h n d)` → `(b h m d)`.

    `bias` broadcasts to `(b h m n)`. `products` chooses two batched products, as do `products_are_faster` and, on a CPU, a bias that is
    trained: torch's operation has no fast way for its gradient there.
    """
    trained = bias is not None and bias.requires_grad and q.device.type == "cpu"
    if products or trained or products_are_faster(q, dropout):
        return drop(attention_weights(q, k, bias).to(v.dtype), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), dropout_p=dropout)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q·Kᵀ/√d_k + bias), computed in fp32 at least: queries `(b h m d)`, keys `(b h n d)` → `(b h m n)`."""
    scores = q @ k.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(dim=-1)


class MLP(nn.Module):
    """Linear, GELU, dropout, linear, dropout: `(b n d)` → `(b n d)`."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return drop(self.fc2(drop(F.gelu(self.fc1(x)), dropout)), dropout)


class Block(nn.Module):
    """One pre-norm transformer block: x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)).

    In training each sample skips either branch with probability `drop_path`, and the branches of the other samples are scaled
    by 1/(1 − drop_path) (stochastic depth, arXiv 1603.09382).

    With `queries` the output is that of the first tokens only, `(b queries d)`, at a sixth of the block's cost if they
    are few: enough for a last block of which only the CLS token is used.

    Under autocast on a CPU the residual stream has autocast's dtype, since copies between dtypes take a tenth of a step there.
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
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        x = x[:, :queries] + self._skip(self.attn(normalise(self.norm1, x), queries))
        return x + self._skip(self.mlp(normalise(self.norm2, x)))

    def _skip(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        keep = 1.0 - self.drop_path
        return branch * (branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep) / keep)
