"""The decoder of masked autoencoders: pixels of the masked patches from the tokens of the visible ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.validation import at_least
from vitkit_ssl.masking import at_places
from vitkit_vit import LAYER_NORM_EPS, Block, sincos2d


class MAEDecoder(nn.Module):
    """Tokens of visible patches `(b k in_dim)` → pixels of masked patches `(b m out_dim)`.

    Tokens are mapped to `embed_dim` and get the sine and cosine code of their place. A learned mask token with the code of its place
    stands for each masked patch. All pass `depth` pre-norm blocks of `num_heads` heads, and the masked ones a norm and a linear map
    to `out_dim`. The last block computes the masked patches alone.

    `grid_size`: rows and columns of patches. Linear weights and the mask token are drawn from Normal(0, 0.02), biases are zero.

    Raises `UsageError` for dimensions below 1, heads that do not divide `embed_dim`, and inputs that do not fit each other.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377. Its code predicts the visible patches
    too, but its loss leaves them out.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid_size: Sequence[int] = (8, 8),
        embed_dim: int = 96,
        depth: int = 2,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        rows, columns = grid_size
        at_least(1, in_dim=in_dim, out_dim=out_dim, rows=rows, columns=columns, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        if embed_dim % num_heads or embed_dim % 4:
            raise UsageError(f"embed_dim is {embed_dim}; expected a multiple of num_heads={num_heads} and of 4, for position codes")
        self.in_dim, self.num_patches = in_dim, rows * columns
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("positions", sincos2d((rows, columns), embed_dim), persistent=False)  # (n d)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, dropout=0.0, attn_dropout=0.0, drop_path=0.0) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(embed_dim, out_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    positions: Tensor

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        order = torch.rand(samples, 16).argsort(dim=1)
        inputs = {"tokens": torch.randn(samples, 4, 8), "keep": order[:, :4], "masked": order[:, 4:]}
        return {"in_dim": 8, "out_dim": 12, "grid_size": [4, 4], "embed_dim": 16, "num_heads": 2}, inputs

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay."""
        return {"mask_token"}

    def output_weights(self) -> set[str]:
        """Names of the last layer's weights, which are not orthogonalised."""
        return {"pred.weight"}

    def forward(self, tokens: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Tokens `(b t+k in_dim)`, the places of the last k, int64 `(b k)`, and of the masked patches `(b m)` → pixels `(b m out_dim)`.

        The first t tokens have no place in the image: CLS and registers.
        """
        if tokens.ndim != 3 or tokens.shape[1] < keep.shape[1] or not len(tokens) == len(keep) == len(masked):
            raise UsageError(
                f"tokens are {tuple(tokens.shape)}, keep {tuple(keep.shape)} and masked {tuple(masked.shape)}; expected (b, t + k, "
                f"{self.in_dim}), (b, k) and (b, m)"
            )
        codes = self.positions[None].expand(len(tokens), -1, -1)
        visible = self.embed(tokens)
        first = visible.shape[1] - keep.shape[1]
        queries = self.mask_token + at_places(codes, masked)
        x = torch.cat([queries, visible[:, :first], visible[:, first:] + at_places(codes, keep)], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, masked.shape[1])
        return self.pred(self.norm(x.to(self.norm.weight.dtype))).float()  # blocks may leave tokens in autocast's dtype
