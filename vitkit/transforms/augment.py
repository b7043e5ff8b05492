"""Augmentations of whole batches on the device, with parameters drawn for each image.

torchvision's transforms draw one set of parameters for a whole batch. Here a transform is called with images `(n c h w)` in [0, 1] and
a generator on their device, and returns images of the same shape. Neighbouring geometric transforms in a `Compose` are multiplied into
one matrix for each image, so that pixels are sampled once: they are not blurred twice, and a transform can move a part back into the
image that an earlier one moved out.

`p` is the share of images that a transform changes. Ranges are sampled uniformly; a strength x means [1 − x, 1 + x] for factors and
[−x, x] for offsets.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Generator, Tensor

from vitkit.errors import UsageError
from vitkit.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    affine_matrices,
    chain,
    crop_resize,
    gaussian_blur,
    grey,
    matrices_of,
    sample,
    solarize,
)
from vitkit.transforms.mixup import CutMix, Mix, Mixing, MixUp
from vitkit.transforms.randaugment import RandAugment
from vitkit.validation import at_least, in_range


class Transform(Protocol):
    """Images `(n c h w)` in [0, 1] → the same shape; every random choice comes from `generator`."""

    def __call__(self, images: Tensor, generator: Generator) -> Tensor: ...


class Geometric(ABC):
    """A transform that moves pixels: matrices `(n 3 3)` from output to input coordinates, both in [−1, 1].

    - `padding_mode`: "zeros" where it may read beyond the edge, which is black; "border" where it never does, so that half-pixels at
      the edge need no black mixed in.
    - `interpolation`: "nearest" where it only mirrors and moves by whole pixels, which are copied; otherwise "bilinear".
    - `axis_aligned`: True if it only crops, stretches and mirrors; then it can also resize, in the same sampling step.
    """

    padding_mode: ClassVar[Literal["zeros", "border"]] = "zeros"
    interpolation: ClassVar[Literal["nearest", "bilinear"]] = "bilinear"
    axis_aligned: ClassVar[bool] = False

    @abstractmethod
    def matrices(self, images: Tensor, generator: Generator) -> Tensor: ...

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        return _moved([self], images, generator)


@dataclass(frozen=True)
class Compose:
    """Transforms one after another; neighbouring geometric ones are multiplied into one sampling."""

    transforms: Sequence[Transform]

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        moves: list[Geometric] = []
        for transform in self.transforms:
            if isinstance(transform, Geometric):
                moves.append(transform)
                continue
            images = transform(_moved(moves, images, generator), generator)
            moves = []
        return _moved(moves, images, generator)


def cropped_views(
    transform: Transform, images: Tensor, views: int, size: tuple[int, int], generator: Generator
) -> Tensor | None:
    """Views `(b·views c *size)` in [0, 1] of stored images uint8 `(b c h w)`, cropped and resized in one sampling step.

    It applies where `transform` begins with transforms that only crop and mirror; the rest of `transform` follows at the new size.
    None if `transform` begins with another one; the image then has to be resized first.
    """
    steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    moves: list[Geometric] = []
    while steps and isinstance(step := steps[0], Geometric) and step.axis_aligned:
        moves.append(step)
        del steps[0]
    # A turn or a shift that comes next belongs to the same sampling; it can read pixels beyond the crop.
    if not moves or (steps and isinstance(steps[0], Geometric)):
        return None
    every_view = images[:1].expand(len(images) * views, *images.shape[1:])  # only its shape is used; nothing is copied
    cropped = crop_resize(images.float().div_(255), _matrices(moves, every_view, generator), size)
    return Compose(steps)(cropped, generator)


def _moved(moves: Sequence[Geometric], images: Tensor, generator: Generator) -> Tensor:
    if not moves:
        return images
    return sample(
        images, _matrices(moves, images, generator),
        padding_mode="border" if all(move.padding_mode == "border" for move in moves) else "zeros",
        interpolation="nearest" if all(move.interpolation == "nearest" for move in moves) else "bilinear",
    )  # fmt: skip


def _matrices(moves: Sequence[Geometric], images: Tensor, generator: Generator) -> Tensor:
    total = moves[0].matrices(images, generator)
    for move in moves[1:]:
        total = chain(total, move.matrices(images, generator))
    return total


@dataclass(frozen=True)
class RandomAffine(Geometric):
    """Shear along x by up to `shear` degrees, rotate by up to `degrees`, scale, and move by up to `translate` of the side.

    Like torchvision's RandomAffine, but it moves by fractions of a pixel, while torchvision rounds to whole pixels.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0

    def __post_init__(self) -> None:
        _check_limits("scale", self.scale)

    def matrices(self, images: Tensor, generator: Generator) -> Tensor:
        def offset(most: float) -> Tensor:
            return uniform(images, generator, -most, most)

        return affine_matrices(
            images,
            angle=offset(self.degrees),
            shear=offset(self.shear),
            scale=uniform(images, generator, *self.scale),
            translate=(offset(self.translate), offset(self.translate)),
        )


@dataclass(frozen=True)
class RandomResizedCrop(Geometric):
    """A crop of a share `scale` of the area, its width to its height within `ratio`, stretched to the size of the image.

    A side that would be longer than the image is cut to the image; torchvision draws up to ten times instead.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding_mode: ClassVar[Literal["zeros", "border"]] = "border"
    axis_aligned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_limits("scale", self.scale)
        _check_limits("ratio", self.ratio)

    def matrices(self, images: Tensor, generator: Generator) -> Tensor:
        wide, high = _sides(images, generator, self.scale, self.ratio)
        x, y = ((1 - side) * uniform(images, generator, -1, 1) for side in (wide, high))
        return matrices_of(wide, 0.0, x, 0.0, high, y)


@dataclass(frozen=True)
class RandomCrop(Geometric):
    """The image moved by whole pixels, up to `padding` each way, black outside: a crop of the padded image."""

    padding: int = 4
    interpolation: ClassVar[Literal["nearest", "bilinear"]] = "nearest"

    def __post_init__(self) -> None:
        at_least(0, padding=self.padding)

    def matrices(self, images: Tensor, generator: Generator) -> Tensor:
        height, width = images.shape[2:]
        offsets = (-self.padding, self.padding + 1)
        across, down = torch.randint(*offsets, (2, len(images)), device=images.device, generator=generator)
        return matrices_of(1.0, 0.0, 2 * across / width, 0.0, 1.0, 2 * down / height)


@dataclass(frozen=True)
class HorizontalFlip(Geometric):
    """Mirror left and right."""

    p: float = 0.5
    padding_mode: ClassVar[Literal["zeros", "border"]] = "border"
    interpolation: ClassVar[Literal["nearest", "bilinear"]] = "nearest"
    axis_aligned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        in_range(0, 1, p=self.p)

    def matrices(self, images: Tensor, generator: Generator) -> Tensor:
        flip = uniform(images, generator, 0, 1) < self.p
        return matrices_of(torch.where(flip, -1.0, 1.0), 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class ColorJitter:
    """Multiply brightness, contrast and saturation by a factor each and turn the hue by a share of the circle, in that order.

    Like torchvision's ColorJitter, which also draws the order. Images of one channel have neither saturation nor hue.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        in_range(0, 0.5, hue=self.hue)
        in_range(0, 1, p=self.p)
        at_least(0, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        chosen = uniform(images, generator, 0, 1) < self.p
        steps = (
            (self.brightness, adjust_brightness),
            (self.contrast, adjust_contrast),
            (self.saturation, adjust_saturation),
        )
        for strength, adjust in steps:
            if strength:
                factor = uniform(images, generator, max(0.0, 1 - strength), 1 + strength)
                images = adjust(images, torch.where(chosen, factor, 1.0))
        if self.hue:
            images = adjust_hue(images, torch.where(chosen, uniform(images, generator, -self.hue, self.hue), 0.0))
        return images


@dataclass(frozen=True)
class Grayscale:
    """Every channel becomes the luma."""

    p: float = 0.2

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        return torch.where(_chosen(images, generator, self.p), grey(images), images)


@dataclass(frozen=True)
class GaussianBlur:
    """A blur of standard deviation `sigma` pixels, its kernel cut to `kernel_size` pixels."""

    kernel_size: int = 5
    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def __post_init__(self) -> None:
        _check_limits("sigma", self.sigma)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        blurred = gaussian_blur(images, uniform(images, generator, *self.sigma), kernel_size=self.kernel_size)
        return torch.where(_chosen(images, generator, self.p), blurred, images)


@dataclass(frozen=True)
class Solarize:
    """Pixels x ≥ `threshold` become 1 − x."""

    threshold: float = 0.5
    p: float = 0.2

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        chosen = uniform(images, generator, 0, 1) < self.p
        return solarize(images, torch.where(chosen, self.threshold, torch.inf))


@dataclass(frozen=True)
class RandomErasing:
    """A rectangle of a share `scale` of the area, its width to its height within `ratio`, becomes black."""

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        _check_limits("scale", self.scale)
        _check_limits("ratio", self.ratio)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        inside = _chosen(images, generator, self.p)
        sides = _sides(images, generator, self.scale, self.ratio)
        for dim, side in ((3, sides[0]), (2, sides[1])):
            length = images.shape[dim]
            side = side.clamp(min=1 / length)[:, None]  # one pixel's centre lies inside
            start = uniform(images, generator, 0, 1)[:, None] * (1 - side)
            centres = (torch.arange(length, device=images.device) + 0.5) / length
            within = (centres >= start) & (centres < start + side)  # (n length)
            inside = inside & within[:, None, None, :].transpose(dim, 3)
        return images.masked_fill(inside, 0.0)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of a standard deviation drawn from [0, std], clamped to [0, 1]."""

    std: float = 0.1

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        strength = uniform(images, generator, 0, self.std).view(-1, 1, 1, 1)
        noise = torch.empty(images.shape, device=images.device).normal_(generator=generator)
        return noise.mul_(strength).add_(images).clamp_(0, 1)


def uniform(images: Tensor, generator: Generator, low: float, high: float) -> Tensor:
    """`(n,)` numbers drawn uniformly from [low, high], one for each image, on the images' device."""
    return low + (high - low) * torch.rand(len(images), device=images.device, generator=generator)


def _chosen(images: Tensor, generator: Generator, p: float) -> Tensor:
    """`(n 1 1 1)` booleans, each true with probability `p`."""
    return (uniform(images, generator, 0, 1) < p).view(-1, 1, 1, 1)


def _sides(
    images: Tensor, generator: Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Width and height `(n,)` of rectangles, as shares of the image's: the area within `scale`, w/h within `ratio`."""
    area = uniform(images, generator, *scale)
    stretch = uniform(images, generator, math.log(ratio[0]), math.log(ratio[1])).exp()
    stretch = stretch * (images.shape[2] / images.shape[3])  # the ratio is measured in pixels
    return (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)


def _check_limits(name: str, limits: tuple[float, float]) -> None:
    if not 0 < limits[0] <= limits[1]:
        raise UsageError(f"{name} is {limits}; expected two positive numbers, the smaller one first")


__all__ = [
    "ColorJitter", "Compose", "CutMix", "GaussianBlur", "Geometric", "Grayscale", "HorizontalFlip", "Mix", "MixUp", "Mixing",
    "Noise", "RandAugment", "RandomAffine", "RandomCrop", "RandomErasing", "RandomResizedCrop", "Solarize", "Transform",
    "cropped_views", "uniform",
]  # fmt: skip
