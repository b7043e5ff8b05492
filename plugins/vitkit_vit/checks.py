"""Arguments of the vision transformer that have to fit each other."""

from collections.abc import Sequence

from vitkit.errors import UsageError
from vitkit.validation import at_least, one_of


def check_attention(
    attention: str, window: int, grid: tuple[int, int], *, rotary: bool, relative_bias: bool, one_size: bool
) -> bool:
    """Whether attention depends on the places of patches.

    Raises `UsageError` for another kind of attention, windows that do not divide the grid, what linear attention cannot do, and places of
    images of more than one size.
    """
    one_of(("softmax", "linear", "windowed"), attention=attention)
    at_least(1, window=window)
    if attention == "windowed" and (grid[0] % window or grid[1] % window):
        fitting = [side for side in range(2, min(grid) + 1) if grid[0] % side == 0 and grid[1] % side == 0]
        sizes = f"take window={' or '.join(map(str, fitting))}" if fitting else "take another patch_size or img_size"
        raise UsageError(f"window={window} does not divide the grid of {grid[0]}×{grid[1]} patches; {sizes}")
    if attention == "linear" and (rotary or relative_bias):
        given = "positions='rotary'" if rotary else "relative_bias=True"
        raise UsageError(
            f"{given} changes the scores of pairs of tokens, and attention='linear' has none; take positions='sincos2d', or "
            f"attention='softmax'"
        )
    placed = attention == "windowed" or rotary or relative_bias
    if placed and not one_size:
        raise UsageError(
            "dynamic_img_size=True takes grids of several sizes; windows, relative biases and rotary positions are those of one: leave "
            "either out"
        )
    return placed


def image_size(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """(height, width) in pixels of one number or two."""
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise UsageError(f"img_size is {img_size!r}, expected a number of pixels or (height, width)")
    height, width = sizes
    if height % patch_size or width % patch_size:
        near = tuple(max(round(size / patch_size), 1) * patch_size for size in sizes)
        raise UsageError(
            f"patch_size={patch_size} does not divide an image of {height}×{width} pixels; take img_size={near} or "
            f"another patch_size"
        )
    return height, width


def check_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim % num_heads:
        around = (heads for step in range(num_heads) for heads in (num_heads - step, num_heads + step))
        near = next(heads for heads in around if embed_dim % heads == 0)  # 1 at the latest
        raise UsageError(
            f"num_heads={num_heads} does not divide embed_dim={embed_dim}; take num_heads={near} or "
            f"embed_dim={max(round(embed_dim / num_heads), 1) * num_heads}"
        )
