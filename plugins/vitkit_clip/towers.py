"""The three ways in which `PairViT` encodes a pair: pixels `(b c h 2w)` → tokens `(b n d)` and halves `(b 2 d)`."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit_clip.stem import ResidualStem
from vitkit_vit import Block, ViT

EPS = 1e-6


class PostNormTower(nn.Module):
    """One sequence over both halves through torch's own post-norm encoder layers with ReLU."""

    def __init__(
        self, img_size: tuple[int, int], in_chans: int, *, dropout: float, embed_dim: int, depth: int, num_heads: int,
        mlp_dim: int, patch_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid_size, self.patch_size, self.embed_dim = _grid(img_size, patch_size), patch_size, embed_dim
        _check_blocks(depth, num_heads, embed_dim)
        rows, columns = self.grid_size
        self.patch_embed = nn.Linear(in_chans * patch_size**2, embed_dim)
        self.positions = nn.Parameter(torch.randn(1, rows * columns, embed_dim) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(embed_dim, num_heads, mlp_dim, dropout, batch_first=True) for _ in range(depth)
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay."""
        return {"positions"}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._embed(x)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens, _halves(tokens, self.grid_size)

    def join(self, halves: Tensor) -> Tensor:
        return halves.mean(dim=1)

    def attention_maps(self, x: Tensor) -> Tensor:
        tokens = self._embed(x)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        weights = self.blocks[-1].get_submodule("self_attn")(tokens, tokens, tokens, need_weights=True)[1]  # (b n n)
        return weights.mean(dim=1).unflatten(1, self.grid_size)

    def _embed(self, x: Tensor) -> Tensor:
        size = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
        return self.patch_embed(patches) + self.positions


class WholeTower(nn.Module):
    """One sequence over both halves through the registered ViT, with linear maps drawn by Xavier's rule."""

    def __init__(
        self, img_size: tuple[int, int], in_chans: int, *, dropout: float, embed_dim: int, depth: int, num_heads: int,
        mlp_dim: int, patch_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid_size, self.embed_dim = _grid(img_size, patch_size), embed_dim
        self.vit = ViT(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth,
            num_heads=num_heads, mlp_ratio=mlp_dim / embed_dim, dropout=dropout, pool="mean",
        )  # fmt: skip
        for module in self.vit.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        self.pair = nn.Linear(2 * embed_dim, embed_dim)  # a mean of halves would lose left and right

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit(x)
        return tokens, _halves(tokens, self.grid_size)

    def join(self, halves: Tensor) -> Tensor:
        return self.pair(halves.flatten(1))

    def attention_maps(self, x: Tensor) -> Tensor:
        return self.vit.attention_maps(x)[:, -1].mean(dim=(1, 2)).unflatten(1, self.grid_size)


class HalvesTower(nn.Module):
    """Each half through one stem and blocks of one half, then both through `joint_depth` blocks with different positions."""

    def __init__(
        self, half: tuple[int, int], in_chans: int, stem_depth: int, joint_depth: int, *, dropout: float,
        stem: Sequence[int], depth: int, num_heads: int, mlp_dim: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = ResidualStem(in_chans, stem, stem_depth)
        self.embed_dim = width = stem[-1]
        _check_blocks(depth, num_heads, width)
        if not 0 <= joint_depth <= depth:
            raise UsageError(
                f"joint_depth is {joint_depth}; expected from 0 to depth={depth} blocks that see both halves"
            )
        self.rows, self.columns = _grid(half, self.stem.stride)
        cells = self.rows * self.columns
        self.positions = nn.Parameter(torch.randn(1, cells, width) * 0.02)
        self.sides = nn.Parameter(torch.randn(1, 2, 1, width) * 0.02)
        blocks = [
            Block(width, num_heads, mlp_ratio=mlp_dim / width, dropout=dropout, attn_dropout=dropout, drop_path=0.0)
            for _ in range(depth)
        ]
        for module in (module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        self.own = nn.Sequential(*blocks[: depth - joint_depth])
        self.joint = nn.Sequential(*blocks[depth - joint_depth :])
        self.norms = nn.ModuleList(nn.LayerNorm(w, eps=EPS) for w in stem)
        self.merge = nn.Linear(sum(stem), width)
        self.pair = nn.Linear(2 * width, width)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay."""
        return {"positions", "sides"}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *earlier, tokens = self._stemmed(x)
        for block in self.joint:
            tokens = block(tokens)
        tokens = self.norms[-1](tokens.to(self.positions.dtype))  # blocks may leave them in autocast's
        means = [m.flatten(1, 2).mean(dim=1, dtype=self.positions.dtype) for m in earlier]  # (2b c_i)
        means = [norm(mean) for norm, mean in zip(self.norms, means, strict=False)]
        last = tokens.unflatten(1, (2, -1)).mean(dim=2).flatten(0, 1)  # (b 2n d) → (2b d)
        return tokens, self.merge(torch.cat([*means, last], dim=1)).unflatten(0, (-1, 2))

    def join(self, halves: Tensor) -> Tensor:
        return self.pair(halves.flatten(1))

    def attention_maps(self, x: Tensor) -> Tensor:
        tokens = self._stemmed(x)[-1]
        if not self.joint:
            raise UsageError("with joint_depth=0 no block sees both halves; there is no attention over a pair to show")
        for block in self.joint[:-1]:
            tokens = block(tokens)
        block = self.joint[-1]
        assert isinstance(block, Block)
        weights = block.attn.maps(block.norm1(tokens)).mean(dim=(1, 2))  # (b 2n): over heads and queries
        return rearrange(weights, "b (two h w) -> b h (two w)", two=2, h=self.rows)

    def _stemmed(self, x: Tensor) -> list[Tensor]:
        """The earlier maps of the stem, one per half, and the tokens of pairs `(b 2n d)` that enter the joint blocks."""
        images = rearrange(x, "b c h (two w) -> (b two) c h w", two=2)
        *earlier, last = self.stem(images)
        tokens = self.own(last.flatten(1, 2) + self.positions)  # (2b n d)
        tokens = rearrange(tokens, "(b two) n d -> b two n d", two=2) + self.sides
        return [*earlier, tokens.flatten(1, 2)]


def _grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    rows, columns = size[0] // patch, size[1] // patch
    if size[0] % patch or size[1] % patch or min(rows, columns) < 1:
        raise UsageError(f"{size[0]}×{size[1]} pixels do not divide into cells of {patch}×{patch}; resize the images")
    return rows, columns


def _check_blocks(depth: int, num_heads: int, width: int) -> None:
    if depth < 1 or num_heads < 1 or width % num_heads:
        raise UsageError(
            f"depth={depth}, num_heads={num_heads}, width {width}: expected a block, and heads that divide it"
        )


def _halves(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens `(b h·2w d)` in row-major order → the mean of each half `(b 2 d)`."""
    rows, columns = grid
    if columns % 2:
        raise UsageError(
            f"{columns} columns of patches cannot be halved; take a patch size that divides a half's width"
        )
    return rearrange(tokens, "b (h two w) d -> b two (h w) d", h=rows, two=2).mean(dim=2)
