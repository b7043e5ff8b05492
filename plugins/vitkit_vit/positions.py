"""Fixed sinusoidal position codes, added to tokens or as rotations of queries and keys."""

import torch
import torch.nn.functional as F
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


def rotary2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Cosines and sines `(2 h·w dim)` of a grid's cells in row-major order, for heads of `dim` dimensions.

    Pair i of dim/2 is turned by r·ω_i for i < dim/4 and else by c·ω_(i − dim/4), with row r, column c and ω_i = 100^(−4i/dim).
    The dimensions i and i + dim/2 are a pair. Raises `UsageError` if `dim` is no multiple of four.

    Source: axial rotary embedding of Heo et al., arXiv 2403.13298, with its base 100.
    """
    if dim % 4:
        raise UsageError(f"positions='rotary' needs heads of a multiple of four dimensions; given embed_dim / num_heads = {dim}")
    omega = 100.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (dim/4)
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * omega, columns.reshape(-1, 1) * omega], dim=1).repeat(1, 2)  # (h·w dim)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotation_of(rotation: Tensor, cells: Tensor, first: int, last: int) -> Tensor:
    """Cosines and sines `(2 1 1 n dim)` or `(2 b 1 n dim)` of `first` tokens, the patches `cells` and `last` tokens.

    Tokens without a place are not turned.
    """
    places = rotation[:, cells] if cells.ndim == 2 else rotation[:, None, cells]  # (2 b p dim)
    cosines, sines = (F.pad(part, (0, 0, first, last), value=value) for part, value in zip(places, (1.0, 0.0), strict=True))
    return torch.stack([cosines, sines])[:, :, None]
