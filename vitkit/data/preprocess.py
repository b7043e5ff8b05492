"""Preprocessing: from stored pixels, or image files, to the input of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from vitkit.data.decode import in_colour, on_white, reduced
from vitkit.errors import UsageError
from vitkit.transforms.functional import grey


@dataclass(frozen=True)
class Preprocessing:
    """From stored pixels to the input of a model: `shape` `(c h w)`, and `mean` and `std` of pixels scaled to [0, 1].

    `fit` "pad" surrounds a smaller image with black, as LeNet does with MNIST; "resize" resizes it, antialiased.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["pad", "resize"] = "resize"

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 `(n c h w)` → float32 in [0, 1] of this size.

        Grey images are repeated if RGB images are expected; RGB images become luma (ITU-R BT.601) if grey images are expected.
        """
        if {images.shape[1], self.shape[0]} == {1, 3}:
            images = images.expand(-1, 3, -1, -1) if self.shape[0] == 3 else grey(images.float()).round()
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.div_(255)
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
        """The dict that `config.json` stores."""
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std), "fit": self.fit}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`; `UsageError` for anything else."""
        try:
            channels, height, width = (int(size) for size in data["shape"])
            mean, std = tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
            valid = data["fit"] in ("pad", "resize") and len(mean) == len(std) == channels
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise UsageError(f"preprocessing is {data!r:.120}; expected shape, mean, std and fit")
        return cls((channels, height, width), mean, std, data["fit"])


def preprocess(images: Tensor | Sequence[Image.Image], preprocessing: Preprocessing) -> Tensor:
    """uint8 `(n c h w)` in [0, 255], or Pillow images of any size and mode → normalised float32 `(n c h w)`.

    Pillow images are turned upright by their EXIF orientation, laid on white if they are transparent, made grey or RGB, and, if
    `preprocessing` resizes, cropped around their centre to its proportions. Grey tensors are repeated for a model of RGB images, and
    RGB ones become luma (ITU-R BT.601) for a model of grey ones. Raises `UsageError` for another type, other numbers of channels, and
    an empty list.
    """
    channels = preprocessing.shape[0]
    if isinstance(images, Tensor):
        convertible = images.ndim == 4 and {images.shape[1], channels} in ({channels}, {1, 3})
        if images.dtype != torch.uint8 or not convertible:
            raise UsageError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (n, {channels}, h, w)")
        return preprocessing.normalise(preprocessing.pixels(images))
    if isinstance(images, Image.Image) or not images or not all(isinstance(one, Image.Image) for one in images):
        raise UsageError(f"images are {images!r:.80}; expected a uint8 tensor or a list of Pillow images")
    if channels not in (1, 3):
        raise UsageError(f"this model takes {channels} channels, which no Pillow image has; give a uint8 tensor")
    return torch.cat([preprocessing.normalise(preprocessing.pixels(_pixels(one, preprocessing))) for one in images])


def _pixels(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """uint8 `(1 c h w)`."""
    channels, height, width = preprocessing.shape
    image = in_colour(ImageOps.exif_transpose(image))
    if preprocessing.fit == "resize":
        scale = min(image.width / width, image.height / height)
        across, down = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (image.width - across) // 2, (image.height - down) // 2
        image = image.crop((left, top, left + across, top + down))
    image = on_white(reduced(image, (height, width))).convert("L" if channels == 1 else "RGB")
    return torch.from_numpy(np.array(image)).view(1, image.height, image.width, channels).permute(0, 3, 1, 2)


def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`(c 1 1)`, filled on the device: copying it there would wait for the GPU."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


__all__ = ["Preprocessing", "preprocess"]
