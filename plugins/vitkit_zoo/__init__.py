"""Backbones beside the plain vision transformer: `cct`, `convnext`, `mobilevit`, `pvt` and `swin`."""

from vitkit_zoo.cct import CCT
from vitkit_zoo.convnext import ConvNeXt
from vitkit_zoo.mobilevit import MobileViT
from vitkit_zoo.pvt import PVT
from vitkit_zoo.swin import Swin

__all__ = ["CCT", "PVT", "ConvNeXt", "MobileViT", "Swin"]
