"""Preprocessing: from stored pixels, or a person's own pictures, to what a model sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from vitkit.errors import UsageError
from vitkit.transforms.functional import grey


@dataclass(frozen=True)
class Preprocessing:
    """From stored pixels to what a model sees: `shape` `(c h w)`, and `mean` and `std` of pixels scaled to [0, 1].

    `fit` "pad" surrounds a smaller image with black (LeNet's way with MNIST), "resize" resizes it, antialiased.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["pad", "resize"] = "resize"

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 `(n c h w)` → float32 in [0, 1] of this size."""
        images = images.float().div_(255)
        height, width = self.shape[1:]
        down, across = height - images.shape[2], width - images.shape[3]
        if not down and not across:
            return images
        if self.fit == "pad" and down >= 0 and across >= 0:
            return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(x − mean)/std per channel; images `(… c h w)` in [0, 1]."""
        mean, std = (_column(values, images.device) for values in (self.mean, self.std))
        return (images * (1 / std)).sub_(mean / std)

    def to_json(self) -> dict[str, Any]:
        """As `config.json` keeps it."""
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std), "fit": self.fit}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`; `UsageError` where it is something else."""
        try:
            channels, height, width = (int(size) for size in data["shape"])
            mean, std = tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
            known = data["fit"] in ("pad", "resize") and len(mean) == len(std) == channels
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise UsageError(f"preprocessing names shape, mean, std and fit; given {data!r:.120}")
        return cls((channels, height, width), mean, std, data["fit"])


def preprocess(images: Tensor | Sequence[Image.Image], preprocessing: Preprocessing) -> Tensor:
    """uint8 `(n c h w)` in [0, 255], or Pillow images of any size and mode → normalised float32 `(n c h w)`.

    Pillow images are turned upright by their EXIF data, laid on white where they are transparent, made grey or RGB, and,
    where `preprocessing` resizes, cropped about their middle to its proportions. Grey tensors are repeated for a model of RGB
    images, and RGB ones become luma (ITU-R BT.601) for a model of grey ones. Raises `UsageError` for another type, other
    numbers of channels, and no image at all.
    """
    channels = preprocessing.shape[0]
    if isinstance(images, Tensor):
        if images.dtype == torch.uint8 and images.ndim == 4 and {images.shape[1], channels} == {1, 3}:
            images = images.expand(-1, 3, -1, -1) if channels == 3 else grey(images.float()).round().byte()
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            raise UsageError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (n, {channels}, h, w)")
        return preprocessing.normalise(preprocessing.pixels(images))
    if isinstance(images, Image.Image) or not images or not all(isinstance(one, Image.Image) for one in images):
        raise UsageError(f"images are {images!r:.80}; expected a uint8 tensor or a list of Pillow images")
    if channels not in (1, 3):
        raise UsageError(f"this model takes {channels} channels, which no Pillow image has; give a uint8 tensor")
    return torch.cat([preprocessing.normalise(preprocessing.pixels(_pixels(one, preprocessing))) for one in images])


def _pixels(picture: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """uint8 `(1 c h w)`."""
    channels, height, width = preprocessing.shape
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # convert() would cut 16 bits to white
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if preprocessing.fit == "resize":
        scale = min(picture.width / width, picture.height / height)
        across, down = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (picture.width - across) // 2, (picture.height - down) // 2
        picture = picture.crop((left, top, left + across, top + down))
    return torch.from_numpy(np.array(picture)).view(1, picture.height, picture.width, channels).permute(0, 3, 1, 2)


def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`(c 1 1)`, filled on the device: copying it there would wait for the GPU."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


__all__ = ["Preprocessing", "preprocess"]
