"""The vision transformer (Dosovitskiy et al., arXiv 2010.11929)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from vitkit.errors import UsageError
from vitkit.validation import at_least, in_range, one_of
from vitkit_vit.attention import Layout
from vitkit_vit.checks import check_attention, check_heads, image_size
from vitkit_vit.layers import LAYER_NORM_EPS, Block
from vitkit_vit.positions import rotary2d, rotation_of, sincos1d, sincos2d
from vitkit_vit.stem import ConvStem, PatchEmbed
from vitkit_vit.tokens import gather_tokens, join_tokens

PRESETS: dict[str, dict[str, int]] = {
    "small": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "base": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "large": {"embed_dim": 512, "depth": 24, "num_heads": 8},
}


class ViT(nn.Module):
    """Vision transformer: images `(b c h w)` → tokens `(b n d)`.

    The image is cut into patches, each mapped to `embed_dim` channels. A CLS token and register tokens go in front,
    extra tokens given at call time behind. Then follow `depth` pre-norm blocks and a last layer norm. The order of
    tokens is CLS (with pool="cls"), registers, patches in row-major order, extra tokens.

    `preset` sets `embed_dim`, `depth` and `num_heads` if they are None. Parameters at 32×32 pixels, three channels
    and patch size 4, without a classification head:

    | preset | embed_dim | depth | num_heads | parameters |
    |--------|-----------|-------|-----------|------------|
    | small  | 192       | 12    | 3         | 5,360,832  |
    | base   | 384       | 12    | 6         | 21,338,496 |
    | large  | 512       | 24    | 8         | 75,717,120 |

    - `img_size`: pixels, one number or (height, width); `patch_size` divides both.
    - `dropout`: the probability in [0, 1) that a channel is dropped after the GELU and after the MLP;
      `attn_dropout` that an attention weight is (None: as `dropout`); `drop_path` that a sample skips a branch of the
      last block, growing linearly from 0 at the first.
    - `pool`: what `encode_image` returns: the CLS token, or the mean over patches and extra tokens. With "mean" there
      is no CLS token.
    - `positions`: learned ones for CLS, registers and patches; or fixed sines and cosines of a patch's number
      ("sincos1d") or of its row and column ("sincos2d"), zero for CLS and registers; or none. Extra tokens keep
      the positions that the caller added. "rotary" adds nothing: in every block queries and keys of patches are rotated by their
      row and column, so that scores depend on differences of places (RoPE-ViT, arXiv 2403.13298).
    - `attention`: among all tokens, within windows of `window`×`window` patches that every second block shifts by half, or linear
      in the number of tokens (see `Attention`). Tokens without a place attend to all others, and all others to them.
    - `relative_bias`: add a learned number to every score, for each head and each difference of rows and columns.
    - `checkpoint`: keep only each block's input for the backward pass and compute the rest again.
    - `stem`: "patch" maps each patch by one matrix; "conv" by 3×3 convolutions of stride 2 that see beyond its edge
      (see `ConvStem`), where `patch_size` is a power of two.
    - `dynamic_img_size`: take images of other sizes too, which `patch_size` divides, such as the small crops of DINO. Positions are
      then interpolated between those of `img_size` (bicubic, as in timm).

    Linear weights are drawn from Normal(0, 0.02), the patch embedding's by Kaiming's rule, tokens and learned
    positions from Normal(0, 0.02), all by torch's global generator; biases are zero. Parameters are named as timm
    names them. Raises `UsageError` if arguments do not fit each other.
    """

    pos_embed: Tensor | None
    rotation: Tensor | None

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        attn_dropout: float | None = None,
        drop_path: float = 0.0,
        pool: Literal["cls", "mean"] = "cls",
        positions: Literal["learned", "sincos1d", "sincos2d", "rotary", "none"] = "learned",
        registers: int = 0,
        checkpoint: bool = False,
        preset: Literal["small", "base", "large"] = "small",
        stem: Literal["patch", "conv"] = "patch",
        attention: Literal["softmax", "linear", "windowed"] = "softmax",
        window: int = 4,
        relative_bias: bool = False,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        one_of(PRESETS, preset=preset)
        one_of(("patch", "conv"), stem=stem)
        one_of(("cls", "mean"), pool=pool)
        one_of(("learned", "sincos1d", "sincos2d", "rotary", "none"), positions=positions)
        embed_dim = PRESETS[preset]["embed_dim"] if embed_dim is None else embed_dim
        depth = PRESETS[preset]["depth"] if depth is None else depth
        num_heads = PRESETS[preset]["num_heads"] if num_heads is None else num_heads
        attn_dropout = dropout if attn_dropout is None else attn_dropout
        at_least(
            1, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads
        )
        at_least(0, registers=registers)
        in_range(0, 1, high_included=False, dropout=dropout, attn_dropout=attn_dropout, drop_path=drop_path)
        check_heads(embed_dim, num_heads)
        if int(embed_dim * mlp_ratio) < 1:
            raise UsageError(f"mlp_ratio={mlp_ratio} leaves the MLP of embed_dim={embed_dim} no hidden channel")

        self.img_size = image_size(img_size, patch_size)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_prefix_tokens = int(pool == "cls") + registers
        self.checkpoint, self.dynamic_img_size = checkpoint, dynamic_img_size
        self.needs_layout = check_attention(
            attention, window, self.grid_size, rotary=positions == "rotary", relative_bias=relative_bias, one_size=not dynamic_img_size
        )
        angles = rotary2d(self.grid_size, embed_dim // num_heads) if positions == "rotary" else None
        self.register_buffer("rotation", angles, persistent=False)

        self.patch_embed = (ConvStem if stem == "conv" else PatchEmbed)(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if pool == "cls" else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, embed_dim)) if registers else None
        if positions == "learned":
            places = self.num_prefix_tokens + self.num_patches
            self.pos_embed = nn.Parameter(torch.empty(1, places, embed_dim))
        else:
            self.register_buffer("pos_embed", self._codes(positions), persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    dropout=dropout,
                    attn_dropout=attn_dropout,
                    drop_path=drop_path * i / max(depth - 1, 1),
                    attention=attention,
                    window=window,
                    shift=window // 2 * (i % 2),
                    bias_grid=self.grid_size if relative_bias else None,
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self._draw()

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "registers": 2}, {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay: tokens, positions, relative biases."""
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return {"cls_token", "reg_token", "pos_embed"} | tables

    def forward(
        self,
        x: Tensor | None,
        *,
        extra_tokens: Tensor | None = None,
        keep: Tensor | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Images `(b c h w)` → tokens `(b n d)` behind the last norm, in the order that the class describes.

        With `x` None there are no patches, only CLS, registers and `extra_tokens`. `extra_tokens` `(b m d)`, or
        `(1 m d)` for every sample, go behind the patches. `keep` `(b k)` int64 names patches in [0, num_patches); the
        others never enter the blocks. With `queries` only that many first tokens are returned, which saves most of
        the last block's time. Raises `UsageError` if shapes do not fit.
        """
        tokens = self._embed(x, extra_tokens, keep)
        layout = self._layout(x, tokens, keep)
        for block in self.blocks[:-1]:
            tokens = self._step(block, tokens, layout)
        return self._normed(self._step(self.blocks[-1], tokens, layout, queries))

    def encode_image(
        self, x: Tensor | None, *, extra_tokens: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Images `(b c h w)` → pooled features `(b d)`; arguments as for `forward`."""
        queries = None if self.cls_token is None else 1
        return self.pool(self(x, extra_tokens=extra_tokens, keep=keep, queries=queries))

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens `(b n d)` → `(b d)`: the CLS token, or the mean over patches and extra tokens."""
        if self.cls_token is not None:
            return tokens[:, 0]
        return tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def forward_features(
        self, x: Tensor | None, depths: Sequence[int], *, extra_tokens: Tensor | None = None
    ) -> list[Tensor]:
        """Tokens `(b n d)` behind each number of blocks in `depths`, 1 … depth, and through the last norm.

        Raises `UsageError` for other depths.
        """
        wrong = [depth for depth in depths if not 1 <= depth <= len(self.blocks)]
        if wrong:
            raise UsageError(f"depths {wrong} lie outside 1 … {len(self.blocks)}, the number of blocks")
        tokens = self._embed(x, extra_tokens, None)
        layout, features = self._layout(x, tokens, None), {}
        for number, block in enumerate(self.blocks[: max(depths, default=0)], start=1):
            tokens = self._step(block, tokens, layout)
            if number in depths:
                features[number] = self._normed(tokens)
        return [features[depth] for depth in depths]

    def attention_maps(self, x: Tensor | None, *, extra_tokens: Tensor | None = None) -> Tensor:
        """The attention weights `(b depth heads n n)` of every block; each row, a query's, sums to one."""
        tokens = self._embed(x, extra_tokens, None)
        layout, maps = self._layout(x, tokens, None), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attn.maps(block.norm1(tokens), layout))
            tokens = self._step(block, tokens, layout)
        return torch.stack(maps, dim=1)

    def _draw(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if isinstance(token, nn.Parameter):
                nn.init.normal_(token, std=0.02)

    def _codes(self, positions: str) -> Tensor | None:
        if positions in ("none", "rotary"):
            return None
        if positions == "sincos1d":
            codes = sincos1d(torch.arange(self.num_patches), self.embed_dim)
        else:
            codes = sincos2d(self.grid_size, self.embed_dim)
        return F.pad(codes, (0, 0, self.num_prefix_tokens, 0))[None]  # (1 n d)

    def _embed(self, x: Tensor | None, extra_tokens: Tensor | None, keep: Tensor | None) -> Tensor:
        """The tokens that enter the first block: `(b n d)`."""
        first: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if first and self.pos_embed is not None:
            first = [torch.cat(first, dim=1) + self.pos_embed[:, : self.num_prefix_tokens]]
        patches = None if x is None else self._patches(x, keep)
        return join_tokens(first, patches, extra_tokens, keep, self.embed_dim)

    def _patches(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Patch tokens `(b n d)` with their positions; only those that `keep` names."""
        expected = (self.in_chans, *self.img_size)
        other_size = x.ndim == 4 and x.shape[1:] != expected
        if x.ndim != 4 or (other_size and not self._takes(x)):
            sizes = f"sides that patch_size={self.patch_size} divides" if self.dynamic_img_size else "{}, {}".format(*self.img_size)
            raise UsageError(
                f"images are {tuple(x.shape)}, expected (batch, {self.in_chans}, {sizes}); resize them, or "
                f"build the ViT with their img_size and in_chans"
            )
        patches = self.patch_embed(x)
        if self.pos_embed is not None:
            places = self.pos_embed[:, self.num_prefix_tokens :]
            patches = patches + (self._resized(places, x) if other_size else places)
        return patches if keep is None else gather_tokens(patches, keep)

    def _takes(self, x: Tensor) -> bool:
        """Whether images `(b c h w)` of another size can be taken."""
        whole = not x.shape[2] % self.patch_size and not x.shape[3] % self.patch_size and min(x.shape[2:]) > 0
        return self.dynamic_img_size and x.shape[1] == self.in_chans and whole

    def _resized(self, places: Tensor, x: Tensor) -> Tensor:
        """Positions of patches `(1 n d)`, interpolated to the grid of images `(b c h w)`."""
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        maps = rearrange(places.float(), "1 (h w) d -> 1 d h w", h=self.grid_size[0])
        resized = F.interpolate(maps, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return rearrange(resized, "1 d h w -> 1 (h w) d")

    def _layout(self, x: Tensor | None, tokens: Tensor, keep: Tensor | None) -> Layout | None:
        """The places of the tokens that enter the blocks, if attention needs them."""
        if not self.needs_layout:
            return None
        patches = 0 if x is None else self.num_patches
        cells = torch.arange(patches, device=tokens.device) if keep is None else keep
        last = tokens.shape[1] - self.num_prefix_tokens - cells.shape[-1]
        rotation = None if self.rotation is None else rotation_of(self.rotation, cells, self.num_prefix_tokens, last)
        complete = x is not None and keep is None
        return Layout(self.num_prefix_tokens, self.grid_size, cells, last, complete, rotation)

    def _step(self, block: nn.Module, tokens: Tensor, layout: Layout | None, queries: int | None = None) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return recompute(block, tokens, queries, layout, use_reentrant=False)
        return block(tokens, queries, layout)

    def _normed(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens.to(self.norm.weight.dtype))  # blocks may leave them in autocast's dtype
