"""Augmentations of whole batches of images, with a parameter for each image."""

from vitkit.transforms.augment import (
    ColorJitter,
    Compose,
    HorizontalFlip,
    Noise,
    RandomAffine,
    RandomCrop,
    RandomResizedCrop,
    Transform,
)
from vitkit.transforms.functional import grey
from vitkit.transforms.mixup import CutMix, Mix, Mixing, MixUp
from vitkit.transforms.randaugment import RandAugment

__all__ = [
    "ColorJitter",
    "Compose",
    "CutMix",
    "HorizontalFlip",
    "Mix",
    "MixUp",
    "Mixing",
    "Noise",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomResizedCrop",
    "Transform",
    "grey",
]
