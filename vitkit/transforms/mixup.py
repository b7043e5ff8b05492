"""MixUp and CutMix of batches on the device, with the pair, the share and the box drawn for each image.

torchvision's versions draw one share or box for a whole batch and pair neighbours.

A mixing is called with images `(b c h w)`, or `(b v c h w)` for several views, labels int64 `(b,)` and a generator on their
device, and returns images of the same shape, the index of each image's partner int64 `(b,)`, and weights float32 `(b,)`:
the label of image i counts weights[i], its partner's 1 − weights[i]. All views of an image are mixed in the same way.

Pairs are drawn: each image has another one as its partner, and is the partner of another one; an image without a possible partner is
unchanged. Unlabelled images (−1) are mixed among themselves, so that a pair has two labels or none. With `same_class` only images of one
label are paired, and unlabelled images are not mixed.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from vitkit.contracts import UNLABELLED
from vitkit.errors import UsageError
from vitkit.validation import in_range, one_of, positive


class Mixing(ABC):
    """Each image x_i and its partner x_j become m·x_i + (1 − m)·x_j, with a map m in [0, 1] over the pixels."""

    same_class: bool

    @abstractmethod
    def maps(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Maps `(b h w)`, or `(b 1 1)` where every pixel has the same share, and their means `(b,)`."""

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        if images.ndim not in (4, 5) or labels.shape != images.shape[:1]:
            raise UsageError(
                f"images are {tuple(images.shape)} and labels {tuple(labels.shape)}; expected (b, c, h, w) or "
                f"(b, v, c, h, w), and (b,)"
            )
        partners = _pairs(labels, generator, same_class=self.same_class)
        maps, weights = self.maps(images, generator)
        alone = partners == torch.arange(len(partners), device=partners.device)
        maps = maps.view(len(images), *[1] * (images.ndim - 3), *maps.shape[1:])
        mixed = torch.lerp(images.index_select(0, partners), images, maps.to(images.dtype))
        return mixed, partners, weights.masked_fill(alone, 1.0)


@dataclass(frozen=True)
class MixUp(Mixing):
    """λ·x_i + (1 − λ)·x_j with λ ~ Beta(α, α) for each image (Zhang et al., arXiv 1710.09412).

    Raises `UsageError` for an α that is not positive.
    """

    alpha: float = 1.0
    same_class: bool = False

    def __post_init__(self) -> None:
        positive(alpha=self.alpha)

    def maps(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        share = _beta(images, generator, self.alpha)
        return share[:, None, None], share


@dataclass(frozen=True)
class CutMix(Mixing):
    """A box of the partner's pixels in each image (Yun et al., arXiv 1905.04899).

    The sides of the box are √(1 − λ) of the image's, rounded down to even numbers of pixels, with λ ~ Beta(α, α). Its centre is drawn
    from all pixels, and the part beyond the edge is cut off. The weight is the share of pixels that remain. Raises `UsageError` for an
    α that is not positive.
    """

    alpha: float = 1.0
    same_class: bool = False

    def __post_init__(self) -> None:
        positive(alpha=self.alpha)

    def maps(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return _boxed(images, _beta(images, generator, self.alpha), generator)


@dataclass(frozen=True)
class Mix(Mixing):
    """Mix a share `p` of the images: `cutmix_share` of them by CutMix(`cutmix`), the others by MixUp(`mixup`).

    The choice is made for each image or, with `per="batch"`, for the batch; λ and boxes are drawn for each image in both cases. The
    defaults are timm's, except that timm chooses for batches. Raises `UsageError` for an α that is not positive, shares outside [0, 1]
    and another `per`.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    cutmix_share: float = 0.5
    p: float = 1.0
    per: Literal["image", "batch"] = "image"
    same_class: bool = False

    def __post_init__(self) -> None:
        positive(mixup=self.mixup, cutmix=self.cutmix)
        in_range(0, 1, cutmix_share=self.cutmix_share, p=self.p)
        one_of(("image", "batch"), per=self.per)

    def maps(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        blended, share = MixUp(self.mixup).maps(images, generator)
        boxed, area = CutMix(self.cutmix).maps(images, generator)
        count = len(images) if self.per == "image" else 1
        drawn = torch.rand(2, count, device=images.device, generator=generator).expand(2, len(images))
        mixed, cut = drawn[0] < self.p, drawn[1] < self.cutmix_share
        maps = torch.where(cut[:, None, None], boxed, blended)
        weights = torch.where(cut, area, share)
        return maps.masked_fill(~mixed[:, None, None], 1.0), weights.masked_fill(~mixed, 1.0)


def _pairs(labels: Tensor, generator: Generator, *, same_class: bool) -> Tensor:
    """The partner `(b,)` of each image: the next one in a randomly ordered ring of the images that may be paired with it."""
    count = len(labels)
    places = torch.arange(count, device=labels.device)
    order = torch.randperm(count, device=labels.device, generator=generator)
    # With same_class each unlabelled image is a ring of one.
    rings = torch.where(labels == UNLABELLED, -1 - places, labels) if same_class else labels == UNLABELLED
    order = order[rings[order].argsort(stable=True)]
    ring = rings[order]
    first = torch.ones_like(ring, dtype=torch.bool)
    first[1:] = ring[1:] != ring[:-1]
    start = torch.where(first, places, 0).cummax(0).values
    last = first.roll(-1)  # the last of a ring stands before the first of the next ring
    partners = torch.empty_like(order)
    partners[order] = order[torch.where(last, start, places + 1)]
    return partners


def _beta(images: Tensor, generator: Generator, alpha: float) -> Tensor:
    """`(b,)` numbers from Beta(α, α): G/(G + H) with G and H from Gamma(α)."""
    device = images.device
    if device.type == "mps":  # it has no fp64: draw on the CPU, from a seed that is drawn on the device
        seed = torch.randint(2**31, (), device=device, generator=generator)
        device, generator = torch.device("cpu"), torch.Generator().manual_seed(int(seed))
    shape = torch.full((2, len(images)), alpha, device=device, dtype=torch.float64)
    one, other = torch._standard_gamma(shape, generator=generator)
    # For a tiny α both may be too small for a float: the image is then unchanged.
    return torch.where(one + other > 0, one / (one + other), 1.0).float().to(images.device)


def _boxed(images: Tensor, share: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Maps `(b h w)` that are 0 within a box, which leaves about a `share` of the image, and 1 elsewhere; and their means."""
    within = []
    for length in images.shape[-2:]:
        centre = torch.randint(length, (len(images), 1), device=images.device, generator=generator)
        half = (0.5 * (1 - share).sqrt() * length).long()[:, None]
        pixels = torch.arange(length, device=images.device)
        within.append((pixels >= centre - half) & (pixels < centre + half))  # (b length)
    inside = within[0][:, :, None] & within[1][:, None]
    maps = (~inside).float()
    return maps, maps.mean(dim=(1, 2))


__all__ = ["CutMix", "Mix", "MixUp", "Mixing"]
