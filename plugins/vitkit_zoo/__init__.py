"""Backbones beside the plain vision transformer: `convnext` and `swin`."""

from vitkit_zoo.convnext import ConvNeXt
from vitkit_zoo.swin import Swin

__all__ = ["ConvNeXt", "Swin"]
