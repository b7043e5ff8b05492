"""Augmentations of whole batches of images, with a parameter for each image."""

from vitkit.transforms.augment import (
    ColorJitter,
    Compose,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Noise,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Solarize,
    Transform,
)
from vitkit.transforms.functional import grey
from vitkit.transforms.mixup import CutMix, Mix, Mixing, MixUp
from vitkit.transforms.randaugment import RandAugment

__all__ = [
    "ColorJitter",
    "Compose",
    "CutMix",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "Mix",
    "MixUp",
    "Mixing",
    "Noise",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomResizedCrop",
    "Solarize",
    "Transform",
    "grey",
]
