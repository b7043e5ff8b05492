"""The views of an image that a method compares."""

from typing import Literal

from vitkit.data import View
from vitkit.transforms import (
    ColorJitter,
    Compose,
    Grayscale,
    HorizontalFlip,
    RandomAffine,
    RandomResizedCrop,
    Solarize,
    Transform,
)
from vitkit.validation import at_least, one_of

Augment = Literal["auto", "colour", "crop", "shape"]


def augmentation(augment: Augment, channels: int, *, scale: tuple[float, float] = (0.2, 1.0)) -> Transform:
    """The augmentation of a view, by name; its crops take a share of the image's area within `scale`.

    - "colour": crop, mirror, jitter of colours, grey for a fifth of the images and solarisation for a tenth: for photographs.
    - "crop": crop and mirror alone, as in MAE.
    - "shape": crop and small affine changes without a mirror: for digits and letters.
    - "auto": "shape" for images of one channel, else "colour".

    Raises `UsageError` for another name.
    """
    one_of(("auto", "colour", "crop", "shape"), augment=augment)
    if augment == "auto":
        augment = "shape" if channels == 1 else "colour"
    if augment == "shape":
        return Compose([RandomResizedCrop(scale=(max(scale[0], 0.4), scale[1])), RandomAffine(degrees=15, translate=0.05, shear=10)])
    moves = [RandomResizedCrop(scale=scale), HorizontalFlip()]
    return Compose([*moves, ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale(0.2), Solarize(p=0.1)] if augment == "colour" else moves)


def multi_crop(augment: Augment, channels: int, img_size: int, *, local: int = 0, local_size: int | None = None) -> list[View]:
    """Two global views of `img_size` pixels, and `local` smaller ones of `local_size` (None: half), each of a smaller part of the image.

    Raises `UsageError` for a negative number of views.
    """
    at_least(0, local=local)
    if not local:
        return [View(count=2, transform=augmentation(augment, channels))]
    size = img_size // 2 if local_size is None else local_size
    return [
        View(count=2, transform=augmentation(augment, channels, scale=(0.3, 1.0))),
        View(size=size, count=local, transform=augmentation(augment, channels, scale=(0.1, 0.4))),
    ]


__all__ = ["Augment", "augmentation", "multi_crop"]
