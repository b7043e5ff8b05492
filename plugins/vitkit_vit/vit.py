"""The vision transformer (Dosovitskiy et al., arXiv 2010.11929)."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from vitkit.errors import UsageError
from vitkit_vit.layers import LAYER_NORM_EPS, Block
from vitkit_vit.positions import sincos1d, sincos2d

PRESETS: dict[str, dict[str, int]] = {
    "small": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "base": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "large": {"embed_dim": 512, "depth": 24, "num_heads": 8},
}


class ViT(nn.Module):
    """Vision transformer: images `(b c h w)` → tokens `(b n d)`.

    The image is cut into patches, each mapped to `embed_dim` channels; a CLS token and register tokens go in front,
    extra tokens given at call time behind; then `depth` pre-norm blocks and a last layer norm. The order of tokens is
    CLS (with pool="cls"), registers, patches in row-major order, extra tokens.

    `preset` sets `embed_dim`, `depth` and `num_heads` wherever they are None. Parameters of the encoder, without a
    classification head, at 32×32 pixels, three channels and patch size 4:

    | preset | embed_dim | depth | num_heads | parameters |
    |--------|-----------|-------|-----------|------------|
    | small  | 192       | 12    | 3         | 5,360,832  |
    | base   | 384       | 12    | 6         | 21,338,496 |
    | large  | 512       | 24    | 8         | 75,717,120 |

    - `img_size`: pixels, one number or (height, width); `patch_size` must divide both.
    - `dropout`: probability in [0, 1) of dropping a channel after the GELU and after the MLP; `attn_dropout` that of
      dropping an attention weight (None: as `dropout`); `drop_path` that of a sample's skipping a branch, growing
      linearly from 0 at the first block to `drop_path` at the last.
    - `pool`: what `encode_image` returns: the CLS token, or the mean over patches and extra tokens; with "mean" there
      is no CLS token.
    - `positions`: learned for CLS, registers and patches, or fixed sines and cosines of the patch's index ("sincos1d")
      or row and column ("sincos2d") with zeros for CLS and registers, or none. Extra tokens get no position: the caller
      adds what they need.
    - `checkpoint`: keep only each block's input for the backward pass and compute the rest again.

    Linear weights are drawn from Normal(0, 0.02), the patch embedding's by Kaiming's rule, tokens and learned positions
    from Normal(0, 0.02), all from torch's global generator. The names of parameters are timm's. Raises `UsageError`
    where the arguments do not fit each other.
    """

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
        positions: Literal["learned", "sincos1d", "sincos2d", "none"] = "learned",
        registers: int = 0,
        checkpoint: bool = False,
        preset: Literal["small", "base", "large"] = "small",
    ) -> None:
        super().__init__()
        attn_dropout = dropout if attn_dropout is None else attn_dropout
        _check_choice("preset", preset, PRESETS)
        _check_choice("pool", pool, ("cls", "mean"))
        _check_choice("positions", positions, ("learned", "sincos1d", "sincos2d", "none"))
        embed_dim = PRESETS[preset]["embed_dim"] if embed_dim is None else embed_dim
        depth = PRESETS[preset]["depth"] if depth is None else depth
        num_heads = PRESETS[preset]["num_heads"] if num_heads is None else num_heads
        _check_least(1, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        _check_least(1, num_heads=num_heads, hidden_channels=int(embed_dim * mlp_ratio))
        _check_least(0, registers=registers)
        _check_probabilities(dropout=dropout, attn_dropout=attn_dropout, drop_path=drop_path)
        if embed_dim % num_heads:
            fits = [heads for heads in range(1, embed_dim + 1) if embed_dim % heads == 0]
            near = min(fits, key=lambda heads: abs(heads - num_heads))
            raise UsageError(
                f"num_heads={num_heads} does not divide embed_dim={embed_dim}; take num_heads={near}, "
                f"or embed_dim={num_heads * max(round(embed_dim / num_heads), 1)}"
            )
        self.img_size = _image_size(img_size, patch_size)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_prefix_tokens = int(pool == "cls") + registers
        self.checkpoint = checkpoint

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if pool == "cls" else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, embed_dim)) if registers else None
        self.pos_embed: Tensor | None = None
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_tokens + self.num_patches, embed_dim))
        elif positions != "none":
            codes = (
                sincos2d(self.grid_size, embed_dim)
                if positions == "sincos2d"
                else sincos1d(torch.arange(self.num_patches), embed_dim)
            )
            codes = torch.cat([codes.new_zeros(self.num_prefix_tokens, embed_dim), codes])
            del self.pos_embed
            self.register_buffer("pos_embed", codes[None], persistent=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, dropout, attn_dropout, drop_path * i / max(depth - 1, 1))
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if isinstance(token, nn.Parameter):
                nn.init.normal_(token, std=0.02)

    def forward(
        self, x: Tensor | None, *, extra_tokens: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Images `(b c h w)` → tokens `(b n d)` after the last norm, in the order the class describes.

        `x` None leaves the patches out: CLS, registers and `extra_tokens` alone. `extra_tokens` `(b m d)`, or `(1 m d)` for
        every sample, go behind the patches. `keep` `(b k)` int64 names the patches to keep, in [0, num_patches); the
        others never enter the blocks. Raises `UsageError` where shapes do not fit.
        """
        return self._normed(self._run(self._embed(x, extra_tokens, keep)))

    def encode_image(self, x: Tensor | None, *, extra_tokens: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Images `(b c h w)` → pooled features `(b d)`; arguments as for `forward`."""
        return self.pool(self(x, extra_tokens=extra_tokens, keep=keep))

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens `(b n d)` of `forward` → `(b d)`: the CLS token, or the mean over patches and extra tokens."""
        if self.cls_token is not None:
            return tokens[:, 0]
        return tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def forward_features(
        self, x: Tensor | None, depths: Sequence[int], *, extra_tokens: Tensor | None = None
    ) -> list[Tensor]:
        """Tokens `(b n d)` after each number of blocks in `depths` (1 … depth), through the last norm, in that order."""
        wrong = [depth for depth in depths if not 1 <= depth <= len(self.blocks)]
        if wrong:
            raise UsageError(f"depths {wrong} lie outside 1 … {len(self.blocks)}, the number of blocks")
        tokens = self._embed(x, extra_tokens, None)
        found = {}
        for number, block in enumerate(self.blocks[: max(depths, default=0)], start=1):
            tokens = block(tokens)
            if number in depths:
                found[number] = self._normed(tokens)
        return [found[depth] for depth in depths]

    def attention_maps(self, x: Tensor | None, *, extra_tokens: Tensor | None = None) -> Tensor:
        """The attention weights `(b depth heads n n)` of every block, without dropout; queries' rows sum to one."""
        tokens = self._embed(x, extra_tokens, None)
        maps = []
        for block in self.blocks:
            maps.append(block.attn.maps(block.norm1(tokens)))
            tokens = block(tokens)
        return torch.stack(maps, dim=1)

    def _embed(self, x: Tensor | None, extra_tokens: Tensor | None, keep: Tensor | None) -> Tensor:
        """What enters the first block: `(b n d)`."""
        if extra_tokens is not None and (extra_tokens.ndim != 3 or extra_tokens.shape[-1] != self.embed_dim):
            raise UsageError(
                f"extra_tokens are {tuple(extra_tokens.shape)}, expected (batch, tokens, {self.embed_dim}); "
                f"one token a sample is extra_tokens[:, None]"
            )
        parts = []
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if prefix:
            parts.append(torch.cat(prefix, dim=1))
            if self.pos_embed is not None:
                parts[0] = parts[0] + self.pos_embed[:, : self.num_prefix_tokens]
        if x is not None:
            parts.append(self._patches(x, keep))
        elif keep is not None:
            raise UsageError("keep names patches, but there is no image; give x or leave keep out")
        if extra_tokens is not None:
            parts.append(extra_tokens)
        elif x is None:
            raise UsageError("neither an image nor extra_tokens were given; give at least one of them")
        batch = x.shape[0] if x is not None else parts[-1].shape[0]
        if parts[-1].shape[0] not in (1, batch):
            raise UsageError(
                f"{parts[-1].shape[0]} samples of extra_tokens for {batch} images; give one for each image, or one for all"
            )
        return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)

    def _patches(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Patch tokens `(b n d)` with their positions; only those that `keep` names."""
        if x.ndim != 4 or x.shape[1:] != (self.in_chans, *self.img_size):
            expected = ", ".join(map(str, (self.in_chans, *self.img_size)))
            raise UsageError(
                f"images are {tuple(x.shape)}, expected (batch, {expected}); resize them, or build the ViT with "
                f"their img_size and in_chans"
            )
        patches = self.patch_embed(x)
        if self.pos_embed is not None:
            patches = patches + self.pos_embed[:, self.num_prefix_tokens :]
        if keep is None:
            return patches
        if keep.ndim != 2 or keep.shape[0] != x.shape[0] or keep.dtype != torch.int64:
            raise UsageError(
                f"keep is {keep.dtype} {tuple(keep.shape)}, expected int64 ({x.shape[0]}, number of patches to keep)"
            )
        return patches.gather(1, keep[:, :, None].expand(-1, -1, self.embed_dim))

    def _run(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpoint and torch.is_grad_enabled():
                tokens = recompute(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens

    def _normed(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens.to(self.norm.weight.dtype))  # blocks may have left them in autocast's dtype


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch: images `(b c h w)` → patches `(b n d)`."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        size = self.proj.kernel_size[0]
        # Patches don't overlap, so the convolution is one matrix product, which CPUs do several times as fast.
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def _image_size(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """(height, width) in pixels, of one number or of two, as JSON may hold them."""
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sizes) != 2:
        raise UsageError(f"img_size is {img_size!r}, expected one number or (height, width)")
    _check_least(1, **{"img_size's height": sizes[0], "img_size's width": sizes[1]})
    if sizes[0] % patch_size or sizes[1] % patch_size:
        near = tuple(max(round(size / patch_size), 1) * patch_size for size in sizes)
        raise UsageError(
            f"patch_size={patch_size} does not divide an image of {sizes[0]}×{sizes[1]} pixels; "
            f"take another patch_size, or img_size={near}"
        )
    return sizes


def _check_choice(name: str, value: str, choices: Sequence[str] | dict[str, dict[str, int]]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def _check_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise UsageError(f"{name} is {value}, expected a probability in [0, 1)")
