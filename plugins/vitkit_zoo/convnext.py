"""ConvNeXt (Liu et al., A ConvNet for the 2020s, arXiv 2201.03545)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from vitkit_vit import normalise
from vitkit_zoo.pyramid import (
    Pyramid,
    channels_first,
    channels_last,
    check_size,
    check_sizes,
    chosen,
    draw_weights,
    image_size,
    rates,
)

EPS = 1e-6
PRESETS: dict[str, dict[str, Any]] = {
    "tiny_32": {"patch_size": 2, "depths": (2, 2, 2), "widths": (32, 64, 128)},
    "small_32": {"patch_size": 2, "depths": (2, 2, 6), "widths": (48, 96, 192)},
    "base_32": {"patch_size": 2, "depths": (2, 2, 6), "widths": (80, 160, 320)},
    "atto": {"patch_size": 4, "depths": (2, 2, 6, 2), "widths": (40, 80, 160, 320)},
    "femto": {"patch_size": 4, "depths": (2, 2, 6, 2), "widths": (48, 96, 192, 384)},
    "pico": {"patch_size": 4, "depths": (2, 2, 6, 2), "widths": (64, 128, 256, 512)},
    "nano": {"patch_size": 4, "depths": (2, 2, 8, 2), "widths": (80, 160, 320, 640)},
    "tiny": {"patch_size": 4, "depths": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    "small": {"patch_size": 4, "depths": (3, 3, 27, 3), "widths": (96, 192, 384, 768)},
    "base": {"patch_size": 4, "depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "large": {"patch_size": 4, "depths": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
}


class ConvNeXt(Pyramid):
    """ConvNeXt: images `(b c h w)` → tokens `(b n d)`.

    A convolution cuts the image into patches of `patch_size` pixels. Each stage but the first begins with a convolution that
    halves the map, and has `depths[i]` blocks of `widths[i]` channels. A block is x + γ·MLP(LayerNorm(DWConv₇ₓ₇(x))), with
    four times as many hidden channels and one γ a channel.

    | preset   | for images of     | patch_size | depths       | widths              | parameters |
    |----------|-------------------|------------|--------------|---------------------|------------|
    | tiny_32  | 28 to 64 pixels   | 2          | 2, 2, 2      | 32, 64, 128         | 412,128    |
    | small_32 | 28 to 64 pixels   | 2          | 2, 2, 6      | 48, 96, 192         | 2,131,152  |
    | base_32  | 28 to 64 pixels   | 2          | 2, 2, 6      | 80, 160, 320        | 5,825,200  |
    | tiny     | 224 pixels        | 4          | 3, 3, 9, 3   | 96, 192, 384, 768   | 27,820,128 |
    | small    | 224 pixels        | 4          | 3, 3, 27, 3  | 96, 192, 384, 768   | 49,454,688 |
    | base     | 224 pixels        | 4          | 3, 3, 27, 3  | 128, 256, 512, 1024 | 87,566,464 |
    | large    | 224 pixels        | 4          | 3, 3, 27, 3  | 192, 384, 768, 1536 | 196,230,336 |

    "atto", "femto", "pico" and "nano" are the smaller models of timm. `patch_size`, `depths` and `widths` replace the preset's.

    - `drop_path`: the probability in [0, 1) that a sample skips the last block, growing linearly from 0 at the first.
    - `layer_scale`: the value of γ before training; None: no γ.

    As in the published code, tokens have no last norm: `encode_image` is the norm of their mean. Rows and columns that a
    convolution of stride 2 does not reach are left out: a map of 7×7 becomes 3×3. Parameters are named as timm names them;
    `vitkit.load_weights` also reads the names of torchvision and of the authors. Weights are drawn from Normal(0, 0.02), cut off at two
    units, biases are zero. Raises `UsageError` for arguments that do not fit each other and images that are too small.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        preset: Literal[
            "tiny_32", "small_32", "base_32", "atto", "femto", "pico", "nano", "tiny", "small", "base", "large"
        ] = "small_32",
        patch_size: int | None = None,
        depths: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
    ) -> None:
        super().__init__()
        values = chosen(PRESETS, preset, patch_size=patch_size, depths=depths, widths=widths)
        check_sizes(in_chans=in_chans, drop_path=drop_path, **values)
        self.in_chans, self.img_size, self.patch_size = in_chans, image_size(img_size), values["patch_size"]
        self.widths = values["widths"]
        self.embed_dim = self.widths[-1]
        least = self.patch_size * 2 ** (len(self.widths) - 1)
        self.least_size = (least, least)
        check_size("ConvNeXt", self.img_size, self.least_size)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, self.widths[0], self.patch_size, stride=self.patch_size), nn.LayerNorm(self.widths[0], eps=EPS)
        )
        skipped = rates(drop_path, values["depths"])
        self.stages = nn.ModuleList(
            Stage(self.widths[max(i - 1, 0)], width, skipped[i], layer_scale, first=i == 0) for i, width in enumerate(self.widths)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=EPS)
        draw_weights(self)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"img_size": 16, "preset": "tiny_32", "depths": [1, 1], "widths": [8, 16], "layer_scale": 0.5}, {}

    def published_names(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Patterns of the names in timm, torchvision and the authors' code, with the names here; see `vitkit.load_weights`."""
        patterns = [(r"^head\.norm\.", "norm."), (r"^downsample_layers\.0\.", "stem."), (r"^features\.0\.", "stem.")]
        patterns += [(r"^(stages\.\d+)\.(\d+)\.", r"\1.blocks.\2."), (r"\.dwconv\.", ".conv_dw."), (r"\.pwconv", ".mlp.fc")]
        patterns += [(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."), (r"^classifier\.0\.", "norm.")]
        for stage in range(len(self.widths)):
            patterns += [(rf"^features\.{2 * stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1.")]
            patterns += [(rf"^features\.{2 * stage}\.", f"stages.{stage}.downsample.")]
        patterns += [(r"\.block\.0\.", ".conv_dw."), (r"\.block\.2\.", ".norm."), (r"\.block\.3\.", ".mlp.fc1.")]
        return [*patterns, (r"\.block\.5\.", ".mlp.fc2."), (r"\.layer_scale$", ".gamma")]

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        norm = self.stem[1]
        assert isinstance(norm, nn.LayerNorm)
        x = normalise(norm, channels_last(self.stem[0](x)))
        for stage in self.stages:
            x = stage(x)
            yield x

    def grid_after(self, stage: int, size: tuple[int, int]) -> tuple[int, int]:
        step = self.patch_size * 2 ** (stage - 1)
        return size[0] // step, size[1] // step

    def encode_image(self, x: Tensor) -> Tensor:
        """Images `(b c h w)` → features `(b d)`: the norm of the tokens' mean."""
        return self.norm(self(x).mean(dim=1))


class Stage(nn.Module):
    """A norm and a convolution that halves the map, except in the first stage, and the blocks: `(b h w d)` → `(b h w d)`."""

    def __init__(self, narrow: int, width: int, drop_path: Sequence[float], layer_scale: float | None, *, first: bool) -> None:
        super().__init__()
        self.downsample = (
            nn.Sequential() if first else nn.Sequential(nn.LayerNorm(narrow, eps=EPS), nn.Conv2d(narrow, width, 2, stride=2))
        )
        self.blocks = nn.Sequential(*(Block(width, rate, layer_scale) for rate in drop_path))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.downsample):
            norm = self.downsample[0]
            assert isinstance(norm, nn.LayerNorm)
            x = channels_last(self.downsample[1](channels_first(normalise(norm, x))))
        return self.blocks(x)


class MLP(nn.Module):
    """Linear, GELU, linear, times `gamma` for each channel: `(... d)` → `(... d)`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        x = F.gelu(self.fc1(x))
        if gamma is None:
            return self.fc2(x)
        # The weights are smaller than the map: multiplying them costs less.
        return F.linear(x, self.fc2.weight * gamma[:, None], self.fc2.bias * gamma)


class Block(nn.Module):
    """x + γ·MLP(LayerNorm(DWConv₇ₓ₇(x))): `(b h w d)` → `(b h w d)`."""

    def __init__(self, width: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, 4 * width)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(normalise(self.norm, channels_last(self.conv_dw(channels_first(x)))), self.gamma)
        return x + stochastic_depth(branch, self.drop_path, "row", self.training)
