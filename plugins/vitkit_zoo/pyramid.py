"""What the backbones share whose maps become smaller and wider from stage to stage."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.validation import at_least, in_range, one_of


class Pyramid(nn.Module):
    """Images `(b c h w)` → a map of each stage `(b h_i w_i d_i)` → tokens `(b n d)` of the last stage, in row-major order.

    A subclass gives `maps`, an iterator over the maps of its stages, and may replace `finish`, what happens to the last map.
    Images may have any size from `least_size` pixels on; `img_size` is the size that `grid_sizes` and `num_patches` describe.

    - `widths`: channels of each stage; `embed_dim` is the last.
    - `grid_sizes`: rows and columns of each stage at `img_size`; `num_patches` counts the last.
    - `least_size`: height and width of the smallest image.
    """

    img_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    widths: tuple[int, ...]
    least_size: tuple[int, int] = (1, 1)
    num_prefix_tokens = 0

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """Images `(b c h w)` → the map `(b h_i w_i d_i)` of each stage, one after another."""
        raise NotImplementedError

    def grid_after(self, stage: int, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the map of `stage`, from 1, for an image of `size` pixels."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """What the last map `(b h w d)` goes through."""
        return x

    def layers_in_order(self) -> list[nn.Module]:
        """The embedding of pixels, then what begins a stage and each of its blocks: learning rates fall towards the input."""
        first, stages = [module for name, module in self.named_children() if name not in ("norm", "final_conv")]
        parts = [part for stage in stages.children() for part in stage.children()]
        return [first, *(layer for part in parts for layer in (part if isinstance(part, nn.Sequential) else [part]))]

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        return [self.grid_after(stage, self.img_size) for stage in range(1, len(self.widths) + 1)]

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.grid_sizes[-1]

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid_size
        return rows * columns

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b c h w)` → tokens `(b n d)` of the last stage."""
        return self._tokens(self.finish(self._last(x)))

    def encode_image(self, x: Tensor) -> Tensor:
        """Images `(b c h w)` → features `(b d)`: the mean over the tokens."""
        return self(x).mean(dim=1)

    def forward_features(self, x: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """Tokens `(b n_i d_i)` of the stages with the numbers `depths`, 1 … `len(widths)`; the last as `forward` gives them.

        Raises `UsageError` for other depths.
        """
        stages = len(self.widths)
        wrong = [depth for depth in depths if not 1 <= depth <= stages]
        if wrong:
            raise UsageError(f"depths {wrong} lie outside 1 … {stages}, the number of stages")
        tokens = {}
        for number, features in enumerate(self.maps(self._checked(x)), start=1):
            if number in depths:
                tokens[number] = self._tokens(self.finish(features) if number == stages else features)
            if number == max(depths, default=0):
                break
        return [tokens[depth] for depth in depths]

    def _last(self, x: Tensor) -> Tensor:
        for features in self.maps(self._checked(x)):
            last = features
        return last

    def _tokens(self, x: Tensor) -> Tensor:
        """A map `(b h w d)` → tokens `(b n d)` in the dtype of the parameters; under autocast a map has autocast's."""
        return x.flatten(1, 2).to(next(self.parameters()).dtype)

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UsageError(
                f"images are {tuple(x.shape)}, expected (batch, {self.in_chans}, height, width); build the {type(self).__name__} "
                f"with their in_chans"
            )
        check_size(type(self).__name__, (x.shape[2], x.shape[3]), self.least_size)
        return x


def check_size(name: str, size: tuple[int, int], least: tuple[int, int]) -> None:
    """Raise `UsageError` for an image with a side below `least`."""
    if size[0] < least[0] or size[1] < least[1]:
        raise UsageError(
            f"images of {size[0]}×{size[1]} pixels are too small: this {name} takes {least[0]}×{least[1]} or more; resize them, or "
            f"take a preset for small images, a smaller patch_size or fewer stages"
        )


def image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels of one number or two."""
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise UsageError(f"img_size is {img_size!r}, expected a number of pixels or (height, width)")
    return sizes[0], sizes[1]


def chosen(presets: dict[str, dict[str, Any]], preset: str, **given: Any) -> dict[str, Any]:
    """The values of a preset, replaced by the given ones that are not None; lists become tuples.

    Raises `UsageError` for an unknown preset and for lists of different lengths.
    """
    one_of(presets, preset=preset)
    values = presets[preset] | {name: value for name, value in given.items() if value is not None}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    lengths = {name: len(value) for name, value in values.items() if isinstance(value, tuple)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in lengths.items())
        raise UsageError(f"the stages do not agree in number: {listed}; give one value for each stage to each of them")
    return values


def check_sizes(*, drop_path: float = 0.0, dropout: float = 0.0, attn_dropout: float = 0.0, **counts: int | Sequence[int]) -> None:
    """Raise `UsageError` for probabilities outside [0, 1) and for counts, or values of lists, below 1."""
    in_range(0, 1, high_included=False, drop_path=drop_path, dropout=dropout, attn_dropout=attn_dropout)
    for name, value in counts.items():
        for number in (value,) if isinstance(value, int) else value:
            at_least(1, **{name: number})


def check_heads(widths: Sequence[int], num_heads: Sequence[int]) -> None:
    """Raise `UsageError` if a stage's heads do not divide its width."""
    for number, (width, heads) in enumerate(zip(widths, num_heads, strict=True), start=1):
        if width % heads:
            near = next(count for count in range(heads, 0, -1) if width % count == 0)
            raise UsageError(f"num_heads={heads} of stage {number} does not divide its width {width}; take {near} heads or another width")


def rates(drop_path: float, depths: Sequence[int]) -> list[list[float]]:
    """The probability of stochastic depth of each block of each stage, growing linearly from 0 at the first to `drop_path`."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [[drop_path * (start + number) / last for number in range(depth)] for start, depth in zip(starts, depths, strict=True)]


def channels_first(x: Tensor) -> Tensor:
    """A map `(b h w d)` as a convolution takes it, `(b d h w)`, with channels still last in memory."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """A map `(b d h w)` → `(b h w d)`."""
    return x.permute(0, 2, 3, 1)


def draw_weights(module: nn.Module, *, std: float = 0.02) -> None:
    """Weights of linear layers and convolutions from a normal distribution cut off at two units; biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def draw_convolutions(module: nn.Module) -> None:
    """Weights of convolutions from Normal(0, √(2 / fan-out)), the fan-out being that of one group."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=(2 / fan) ** 0.5)


__all__ = [
    "Pyramid",
    "channels_first",
    "channels_last",
    "check_heads",
    "check_size",
    "check_sizes",
    "chosen",
    "draw_convolutions",
    "draw_weights",
    "image_size",
    "rates",
]
