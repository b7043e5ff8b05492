"""Windows of a map, shifted or not, and the learned bias between their positions."""

import torch
from einops import rearrange
from torch import Tensor

FORBIDDEN = -100.0
"""Added to the score of two positions that may not attend to each other, as in the published code."""


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """A map `(b h w d)` → its windows `(b p n d)`, p windows in row-major order with n positions each."""
    return rearrange(x, "b (p u) (q v) d -> b (p q) (u v) d", u=window[0], v=window[1])


def from_windows(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Windows `(b p n d)` → the map of `grid` rows and columns `(b h w d)`."""
    return rearrange(x, "b (p q) (u v) d -> b (p u) (q v) d", p=grid[0] // window[0], u=window[0], v=window[1])


def relative_index(window: tuple[int, int]) -> Tensor:
    """For each pair of positions of a window, the row of the table of biases `(n n)`: one row for each difference of rows and columns."""
    rows, columns = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    rows, columns = (axis.flatten()[:, None] - axis.flatten()[None] for axis in (rows, columns))  # (n n)
    return (rows + window[0] - 1) * (2 * window[1] - 1) + columns + window[1] - 1


def shift_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """What is added to the scores within each window of a map that was rolled by `shift`: `(p n n)`.

    It is `FORBIDDEN` between positions that come from opposite edges of the map, and 0 between others.
    """
    parts = []
    for length, side, step in zip(grid, window, shift, strict=True):
        places = torch.arange(length)
        parts.append((places >= length - side).long() + (places >= length - step).long() * (step > 0))
    regions = (parts[0][:, None] * 3 + parts[1][None]).view(1, *grid, 1)
    regions = to_windows(regions, window)[0, :, :, 0]  # (p n)
    return (regions[:, :, None] != regions[:, None, :]) * FORBIDDEN


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of biases `((2·u−1)·(2·v−1) heads)` of windows `old` → that of windows `new`.

    A smaller window has a part of the differences of a larger one, so its table is a part of the larger one's. For a larger
    window, the table is enlarged by bicubic interpolation, with equal ends.
    """
    sides = [(2 * was - 1, 2 * now - 1) for was, now in zip(old, new, strict=True)]
    grid = table.T.unflatten(1, (sides[0][0], sides[1][0]))[None]  # (1 heads 2u−1 2v−1)
    target = tuple(max(was, now) for was, now in sides)
    if target != tuple(grid.shape[2:]):
        grid = torch.nn.functional.interpolate(grid.float(), size=target, mode="bicubic", align_corners=True).to(table.dtype)
    for axis, (_, now) in enumerate(sides, start=2):
        grid = grid.narrow(axis, (grid.shape[axis] - now) // 2, now)
    return grid[0].flatten(1).T


__all__ = ["from_windows", "relative_index", "resize_table", "shift_mask", "to_windows"]
