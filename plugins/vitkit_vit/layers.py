"""The transformer block: attention and an MLP, each after a layer norm and on a residual stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit_vit.attention import Attention, Kind, Layout
from vitkit_vit.products import drop

LAYER_NORM_EPS = 1e-6  # as in the published ViT and timm; torch's own default is 1e-5


def normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """`norm(x)` for tokens `(b n d)`.

    In bf16 on a CPU, scale and shift are applied separately: torch's backward pass adds up their gradients in bf16 there, which is
    wrong by 20 % over 132 rows, and by more over more.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return norm(x)
    plain = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return torch.addcmul(norm.bias.to(x.dtype), plain, norm.weight.to(x.dtype))


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
    are few: enough for a last block of which only the CLS token is used. `attention`, `window`, `shift` and `bias_grid` are those of
    `Attention`, to which `layout` tells the places of the tokens.

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
        attention: Kind = "softmax",
        window: int = 0,
        shift: int = 0,
        bias_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(
            dim, num_heads, attn_dropout, kind=attention, window=window, shift=shift, bias_grid=bias_grid
        )
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor, queries: int | None = None, layout: Layout | None = None) -> Tensor:
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        x = x[:, :queries] + self._skip(self.attn(normalise(self.norm1, x), queries, layout))
        return x + self._skip(self.mlp(normalise(self.norm2, x)))

    def _skip(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        keep = 1.0 - self.drop_path
        return branch * (branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep) / keep)
