"""Augmentations of whole batches on the device, with parameters drawn for each image.

A transform is called with images `(n c h w)` in [0, 1] and a generator, and returns images of the same shape. All
geometric ones in a `Compose` become one matrix an image, so that however many there are, pixels are sampled once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import UsageError


class Transform(Protocol):
    """Images `(n c h w)` in [0, 1] → the same shape, every choice drawn from `generator`."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor: ...


class Geometric(Protocol):
    """A transform that moves pixels: matrices `(n 3 3)` from output to input coordinates, both in [−1, 1]."""

    def matrices(self, images: Tensor, generator: torch.Generator) -> Tensor: ...


def uniform(n: int, low: float, high: float, images: Tensor, generator: torch.Generator) -> Tensor:
    """`(n,)` numbers drawn evenly from [low, high), on the images' device."""
    return torch.empty(n, device=images.device).uniform_(low, high, generator=generator)


def chosen(n: int, p: float, images: Tensor, generator: torch.Generator) -> Tensor:
    """`(n 1 1 1)` booleans, each true with probability `p`."""
    return (torch.rand(n, device=images.device, generator=generator) < p).view(-1, 1, 1, 1)


def sample(images: Tensor, matrices: Tensor) -> Tensor:
    """Images read bilinearly at the places that matrices `(n 3 3)` send the output's pixels to; black outside."""
    grid = F.affine_grid(matrices[:, :2], list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _Sampled:
    """A geometric transform used alone samples by itself."""

    def matrices(self, images: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return sample(images, self.matrices(images, generator))


@dataclass(frozen=True)
class Compose:
    """Transforms one after another; neighbouring geometric ones are multiplied into one sampling."""

    transforms: Sequence[Transform]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        pending: Tensor | None = None
        for transform in self.transforms:
            if isinstance(transform, _Sampled):
                matrices = transform.matrices(images, generator)
                # Output → input: what is applied last is undone first.
                pending = matrices if pending is None else pending @ matrices
                continue
            if pending is not None:
                images, pending = sample(images, pending), None
            images = transform(images, generator)
        return images if pending is None else sample(images, pending)


@dataclass(frozen=True)
class RandomAffine(_Sampled):
    """Turn by up to `degrees`, move by up to `translate` of the side, scale and shear within ranges, all about the centre."""

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0

    def matrices(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        angle = uniform(n, -self.degrees, self.degrees, images, generator) * (math.pi / 180)
        shear = uniform(n, -self.shear, self.shear, images, generator) * (math.pi / 180)
        size = uniform(n, *self.scale, images, generator)
        x, y = (2 * uniform(n, -self.translate, self.translate, images, generator) for _ in range(2))
        cos, sin, slant = angle.cos() / size, angle.sin() / size, shear.tan()
        aspect = height / width  # normalised coordinates are not square where the image is not
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        rows = [
            cos, (sin - cos * slant) * aspect, -(cos * x + (sin - cos * slant) * aspect * y),
            -sin / aspect, cos + sin * slant, -(-sin / aspect * x + (cos + sin * slant) * y),
            zero, zero, one,
        ]  # fmt: skip
        return torch.stack(rows, dim=1).view(n, 3, 3)


@dataclass(frozen=True)
class RandomResizedCrop(_Sampled):
    """A crop of a share `scale` of the area and an aspect within `ratio`, stretched to the whole image."""

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def matrices(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n = len(images)
        area = uniform(n, *self.scale, images, generator)
        stretch = uniform(n, math.log(self.ratio[0]), math.log(self.ratio[1]), images, generator).exp().sqrt()
        wide, high = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
        x = uniform(n, -1, 1, images, generator) * (1 - wide)
        y = uniform(n, -1, 1, images, generator) * (1 - high)
        zero = torch.zeros_like(x)
        rows = [wide, zero, x, zero, high, y, zero, zero, torch.ones_like(x)]
        return torch.stack(rows, dim=1).view(n, 3, 3)


@dataclass(frozen=True)
class HorizontalFlip(_Sampled):
    """Left and right change places with probability `p`."""

    p: float = 0.5

    def matrices(self, images: Tensor, generator: torch.Generator) -> Tensor:
        flip = chosen(len(images), self.p, images, generator).view(-1)
        matrices = torch.eye(3, device=images.device).repeat(len(images), 1, 1)
        matrices[:, 0, 0] = torch.where(flip, -1.0, 1.0)
        return matrices


@dataclass(frozen=True)
class RandomCrop:
    """The image moved by whole pixels up to `padding` in each direction, black outside: a crop of the padded image."""

    padding: int = 4

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, c, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        offsets = torch.randint(0, 2 * self.padding + 1, (2, n, 1), device=images.device, generator=generator)
        rows = (offsets[0] + torch.arange(height, device=images.device))[:, None, :, None]  # (n 1 h 1)
        columns = (offsets[1] + torch.arange(width, device=images.device))[:, None, None, :]  # (n 1 1 w)
        samples = torch.arange(n, device=images.device)[:, None, None, None]
        channels = torch.arange(c, device=images.device)[None, :, None, None]
        return padded[samples, channels, rows, columns]


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation each multiplied by a factor from [1 − x, 1 + x], in that order.

    As torchvision's functional forms: contrast is about the mean of the grey image, saturation about the grey image.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        def factor(strength: float) -> Tensor:
            return uniform(len(images), max(0.0, 1 - strength), 1 + strength, images, generator).view(-1, 1, 1, 1)

        if self.brightness:
            images = (images * factor(self.brightness)).clamp(0, 1)
        if self.contrast:
            images = torch.lerp(_grey(images).mean(dim=(1, 2, 3), keepdim=True), images, factor(self.contrast)).clamp(0, 1)
        if self.saturation and images.shape[1] == 3:
            images = torch.lerp(_grey(images).expand_as(images), images, factor(self.saturation)).clamp(0, 1)
        return images


@dataclass(frozen=True)
class RandomErasing:
    """With probability `p` a rectangle of a share `scale` of the area becomes black."""

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.2)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        side = uniform(n, *self.scale, images, generator).sqrt()
        inside = chosen(n, self.p, images, generator)
        for dim, length in ((2, height), (3, width)):
            start = uniform(n, 0, 1, images, generator) * (1 - side)
            place = (torch.arange(length, device=images.device) + 0.5) / length
            within = (place >= start[:, None]) & (place < (start + side)[:, None])  # (n length)
            inside = inside & within.view(n, 1, *((length, 1) if dim == 2 else (1, length)))
        return images.masked_fill(inside, 0.0)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of a standard deviation drawn from [0, std], clamped to [0, 1]."""

    std: float = 0.1

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        strength = uniform(len(images), 0, self.std, images, generator).view(-1, 1, 1, 1)
        noise = torch.empty_like(images).normal_(generator=generator)
        return (images + strength * noise).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Luma `(n 1 h w)`, with the weights of ITU-R BT.601 that torchvision uses."""
    if images.shape[1] == 1:
        return images
    if images.shape[1] != 3:
        raise UsageError(f"colours need 1 or 3 channels; the images have {images.shape[1]}")
    weights = images.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)
