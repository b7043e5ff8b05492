"""The image tower: features of pairs of images side by side."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.validation import one_of
from vitkit_clip.towers import HalvesTower, PostNormTower, WholeTower

PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {"embed_dim": 512, "depth": 1, "num_heads": 1, "mlp_dim": 1024, "patch_size": 16},
    "enhanced": {"embed_dim": 512, "depth": 6, "num_heads": 8, "mlp_dim": 2048, "patch_size": 8},
    "best": {"stem": [64, 128, 256], "depth": 2, "num_heads": 4, "mlp_dim": 1024},
    "small": {"stem": [32, 64], "depth": 2, "num_heads": 2, "mlp_dim": 128},
}
HALVES = ("best", "small")
"""Presets that encode each half by itself first."""


class PairViT(nn.Module):
    """Pairs of images side by side `(b c h 2w)` → tokens `(b n d)`, the left half's and the right half's.

    | preset   | one sequence of          | blocks                                      | parameters |
    |----------|--------------------------|---------------------------------------------|------------|
    | baseline | 2×4 patches of 16 pixels | 1, one head, MLP 1024, post-norm, ReLU      | 2,500,608  |
    | enhanced | 4×8 patches of 8 pixels  | 6, eight heads, MLP 2048, pre-norm, GELU    | 19,555,328 |
    | best     | 4×4 cells of each half   | 2, four heads, MLP 1024, pre-norm, GELU     | 3,757,312  |

    (at halves of 32×32 pixels with three channels; width 512, 512 and 256; "small" is "best" with stem 32, 64, two heads and MLP
    128). "enhanced" is the registered `vit` with Xavier's initialisation; a pair's feature is a linear map of its halves' mean
    tokens, concatenated, in "baseline" their mean. "best" sends both halves through one encoder, a residual convolutional stem of
    widths `stem` (see `ResidualStem`) and all blocks but the last `joint_depth`; the last ones see both halves, with different
    positions. A half's feature is a linear map of its mean token and of the means of the stem's earlier stages to `embed_dim`; the
    pair's is a linear map of both, as in "enhanced". There `embed_dim` is the stem's last width.

    - `img_size`: pixels of one half, a number or (height, width).
    - `mlp_dim`: the hidden width of a block's MLP; `stem_depth`: residual blocks per stage.

    `encode_image` gives `(b d)`, `encode_halves` `(b 2 d)`. Raises `UsageError` if arguments do not fit each other, and
    for images of another size.

    Source: the dimensions of baseline and enhanced are those of the reference document; it does not name the patch size of
    the baseline; 16 is twice that of enhanced.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 32,
        in_chans: int = 3,
        preset: Literal["baseline", "enhanced", "best", "small"] = "best",
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        patch_size: int | None = None,
        stem: Sequence[int] | None = None,
        stem_depth: int = 1,
        joint_depth: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        one_of(PRESETS, preset=preset)
        given = {
            "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim, "patch_size": patch_size,
            "stem": stem,
        }  # fmt: skip
        by_halves = preset in HALVES
        for name in ("embed_dim", "patch_size") if by_halves else ("stem",):
            if given[name] is not None:
                why = "follows from stem" if by_halves else "belongs to preset='best'"
                raise UsageError(f"{name} is {given[name]!r}, but with preset={preset!r} there is none: it {why}")
        chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.in_chans, self.preset = (height, 2 * width), in_chans, preset
        tower: PostNormTower | WholeTower | HalvesTower
        if by_halves:
            tower = HalvesTower((height, width), in_chans, stem_depth, joint_depth, dropout=dropout, **chosen)
        else:
            tower = (PostNormTower if preset == "baseline" else WholeTower)(
                self.img_size, in_chans, dropout=dropout, **chosen
            )
        self.tower = tower
        self.embed_dim: int = tower.embed_dim
        self.tokens_in_rows = not by_halves  # else all tokens of the left half come first

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"img_size": 16, "stem": [8, 16, 16], "depth": 2, "num_heads": 2, "mlp_dim": 32}, {}

    def forward(self, x: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → tokens `(b n d)` after the last norm."""
        return self.tower(self._checked(x))[0]

    def encode_image(self, x: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → features `(b d)`."""
        return self.join(self.encode_halves(x))

    def encode_halves(self, x: Tensor) -> Tensor:
        """Pairs `(b c h 2w)` → features of the left and of the right half `(b 2 d)`."""
        return self.tower(self._checked(x))[1]

    def join(self, halves: Tensor) -> Tensor:
        """Features of halves `(b 2 d)` → features of pairs `(b d)`."""
        return self.tower.join(halves)

    def attention_maps(self, x: Tensor) -> Tensor:
        """The attention to each part of a pair `(b c h 2w)` in the last block: `(b rows columns)`, summing to one.

        The mean over heads and over all queries; columns run over both halves.
        """
        return self.tower.attention_maps(self._checked(x))

    def _checked(self, x: Tensor) -> Tensor:
        expected = (self.in_chans, *self.img_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise UsageError(
                f"pairs are {tuple(x.shape)}; expected (batch, {', '.join(map(str, expected))}): two images side by side"
            )
        return x
