"""Fixed sinusoidal position codes."""

import torch
from torch import Tensor

from vitkit.errors import UsageError


def sincos1d(positions: Tensor, dim: int) -> Tensor:
    """Codes `(n dim)` of `positions` `(n,)`: sin(p·ω_i), then cos(p·ω_i), with ω_i = 10000^(−2i/dim).

    Raises `UsageError` if `dim` is odd. Source: Vaswani et al., arXiv 1706.03762; as in MAE and timm sines and
    cosines fill a half each and do not alternate.
    """
    if dim % 2:
        raise UsageError(f"positions='sincos1d' needs an even embed_dim, for sines and cosines; given {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))  # (dim/2)
    angles = positions.to(torch.float64)[:, None] * omega  # (n dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Codes `(h·w dim)` of a grid's cells in row-major order: one half codes the column, the other the row.

    Raises `UsageError` if `dim` is no multiple of four. Source: MAE, arXiv 2111.06377.
    """
    if dim % 4:
        raise UsageError(f"positions='sincos2d' needs an embed_dim that four divides; given {dim}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.cat([sincos1d(columns.flatten(), dim // 2), sincos1d(rows.flatten(), dim // 2)], dim=1)
