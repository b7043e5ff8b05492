"""The tokens that enter a stack of blocks: those of an image, and others before and behind them."""

import torch
from torch import Tensor

from vitkit.errors import UsageError


def join_tokens(
    first: list[Tensor], patches: Tensor | None, extra_tokens: Tensor | None, keep: Tensor | None, dim: int
) -> Tensor:
    """Tokens `(b n dim)`: `first` `(1 k dim)` for every sample, the image's `patches` `(b n dim)`, and `extra_tokens`.

    `extra_tokens` are `(b m dim)`, or `(1 m dim)` for every sample. Raises `UsageError` for other shapes, if there is neither an image nor
    an extra token, and for a choice `keep` of patches without an image.
    """
    parts = list(first)
    if patches is not None:
        parts.append(patches)
    elif keep is not None:
        raise UsageError("keep names patches, but there is no image: give x, or leave keep out")
    elif extra_tokens is None:
        raise UsageError("there is neither an image nor an extra token: give x, extra_tokens or both")
    if extra_tokens is not None:
        if extra_tokens.ndim != 3 or extra_tokens.shape[-1] != dim:
            raise UsageError(
                f"extra_tokens are {tuple(extra_tokens.shape)}, expected (batch, tokens, {dim}); "
                f"vectors (batch, {dim}) become one token a sample by extra_tokens[:, None]"
            )
        if patches is not None and len(extra_tokens) not in (1, len(patches)):
            raise UsageError(
                f"{len(extra_tokens)} samples of extra_tokens for {len(patches)} images; give as many, or one for all"
            )
        parts.append(extra_tokens)
    batch = parts[-1].shape[0] if patches is None else patches.shape[0]  # len() would be a constant to an export
    return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)


def gather_tokens(patches: Tensor, keep: Tensor) -> Tensor:
    """The patches `(b n d)` that `keep` `(b k)` int64 names: `(b k d)`. Raises `UsageError` for another `keep`."""
    if keep.dtype != torch.int64 or keep.ndim != 2 or len(keep) != len(patches):
        raise UsageError(
            f"keep is {keep.dtype} {tuple(keep.shape)}, expected int64 ({len(patches)}, patches to keep of an image)"
        )
    return patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[-1]))


__all__ = ["gather_tokens", "join_tokens"]
