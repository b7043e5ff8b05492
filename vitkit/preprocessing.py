"""A person's own pictures, made into what a trained model sees."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitkit.batches import Preparation
from vitkit.errors import UsageError
from vitkit.pixels import grey


def preprocess(images: Tensor | Sequence[Image.Image], prepare: Preparation) -> Tensor:
    """uint8 `(n c h w)` in [0, 255], or Pillow images of any size and mode → normalised float32 `(n c h w)`.

    Pillow images are turned upright by their EXIF data, laid on white where they are transparent, made grey or RGB, and,
    where `prepare` resizes, cropped about their middle to its proportions. Grey tensors are repeated for a model of RGB
    images, and RGB ones become luma (ITU-R BT.601) for a model of grey ones. Raises `UsageError` for another type, other
    numbers of channels, and no image at all.
    """
    channels = prepare.shape[0]
    if isinstance(images, Tensor):
        if images.dtype == torch.uint8 and images.ndim == 4 and {images.shape[1], channels} == {1, 3}:
            images = images.expand(-1, 3, -1, -1) if channels == 3 else grey(images.float()).round().byte()
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            raise UsageError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (n, {channels}, h, w)")
        return prepare.normalise(prepare.pixels(images))
    if isinstance(images, Image.Image) or not images or not all(isinstance(one, Image.Image) for one in images):
        raise UsageError(f"images are {images!r:.80}; expected a uint8 tensor or a list of Pillow images")
    if channels not in (1, 3):
        raise UsageError(f"this model takes {channels} channels, which no Pillow image has; give a uint8 tensor")
    return torch.cat([prepare.normalise(prepare.pixels(_pixels(one, prepare))) for one in images])


def _pixels(picture: Image.Image, prepare: Preparation) -> Tensor:
    """uint8 `(1 c h w)`."""
    channels, height, width = prepare.shape
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # convert() would cut 16 bits to white
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if prepare.fit == "resize":
        scale = min(picture.width / width, picture.height / height)
        across, down = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (picture.width - across) // 2, (picture.height - down) // 2
        picture = picture.crop((left, top, left + across, top + down))
    return torch.from_numpy(np.array(picture)).view(1, picture.height, picture.width, channels).permute(0, 3, 1, 2)


__all__ = ["preprocess"]
