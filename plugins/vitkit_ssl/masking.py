"""Patches: cut from images, drawn at random, and hidden from a backbone."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vitkit.distributed import draw_rows
from vitkit.errors import UsageError
from vitkit.validation import in_range


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images `(b c h w)` → the pixels of their patches in row-major order `(b n c·p·p)`."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """The pixels of all patches `(b n c·p·p)` → images `(b c h w)`; the inverse of `patchify`."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid_size[0], p=patch_size, q=patch_size)


def patch_order(like: Tensor, views: int, patches: int) -> Tensor:
    """A random order of the patches for each view of each image: int64 `(b v patches)`.

    `like` `(b ...)` has one row for each image of this rank. Ranks: orders are drawn on rank 0 for the images of all ranks, so that any
    number of ranks gives the result of one process.
    """
    return draw_rows(lambda n: torch.rand(n, views, patches, device=like.device), like).argsort(dim=-1)


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """Rows of `values` `(b n d)` at `places` int64 `(b k)` → `(b k d)`."""
    return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[-1]))


def hide(images: Tensor, masked: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """Images `(b c h w)` with the patches `masked` int64 `(b m)` set to zero, the mean of normalised images.

    A convolutional stem looks over the edge of a patch. With these images it sees no pixel of a masked patch.
    """
    seen = images.new_ones(len(images), grid_size[0] * grid_size[1]).scatter_(1, masked, 0.0)
    seen = seen.unflatten(1, (1, *grid_size)).repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
    return images * seen


def encode_views(backbone: Any, images: Tensor, keep: float = 1.0) -> Tensor:
    """Views `(b v c h w)` → pooled features `(b v d)`; each view uses a share `keep` of its patches, drawn at random.

    The cost of the transformer blocks falls to about this share (FLIP, Li et al., arXiv 2212.00794). Raises `UsageError` for a share
    outside (0, 1], for images of another shape, and for a backbone without `num_patches` where patches are left out.
    """
    in_range(0, 1, low_included=False, keep=keep)
    if images.ndim != 5:
        raise UsageError(f"views are {tuple(images.shape)}; expected (batch, views, channels, height, width)")
    shape, rows = images.shape[:2], images.flatten(0, 1)
    if keep == 1.0:
        return backbone.encode_image(rows).unflatten(0, shape)
    patches: int | None = getattr(backbone, "num_patches", None)
    if patches is None:
        raise UsageError(f"keep is {keep}, but {type(backbone).__name__} has no num_patches; give keep=1, or a backbone such as 'vit'")
    order = patch_order(images, shape[1], patches).flatten(0, 1)
    return backbone.encode_image(rows, keep=order[:, : max(1, round(keep * patches))]).unflatten(0, shape)


__all__ = ["at_places", "encode_views", "hide", "patch_order", "patchify", "unpatchify"]
