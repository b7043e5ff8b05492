"""Fixed sinusoidal position codes."""

import torch
from torch import Tensor

from vitkit.errors import UsageError


def sincos1d(positions: Tensor, dim: int) -> Tensor:
    """Codes `(n dim)` of `positions` `(n,)`: sin(p·ω_i) in the first half, cos(p·ω_i) in the second, ω_i = 10000^(−2i/dim).

    Raises `UsageError` where `dim` is odd. Source: Vaswani et al., arXiv 1706.03762, with sines and cosines in two
    halves rather than interleaved, as MAE and timm do.
    """
    if dim % 2:
        raise UsageError(f"sinusoidal positions need an even number of channels an axis; given {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))  # (dim/2)
    angles = positions.to(torch.float64)[:, None] * omega  # (n dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Codes `(h·w dim)` of a grid in row-major order: the column's code in the first half, the row's in the second.

    Raises `UsageError` where `dim` is no multiple of four. Source: MAE, arXiv 2111.06377.
    """
    if dim % 4:
        raise UsageError(f"positions='sincos2d' needs an embed_dim that four divides; given {dim}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.cat([sincos1d(columns.flatten(), dim // 2), sincos1d(rows.flatten(), dim // 2)], dim=1)
