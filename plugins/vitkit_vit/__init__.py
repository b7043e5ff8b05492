"""The vision transformer and the plain heads: backbone `vit`, heads `linear` and `mlp`."""

from vitkit_vit.heads import LinearHead, MLPHead
from vitkit_vit.layers import LAYER_NORM_EPS, Block
from vitkit_vit.positions import sincos2d
from vitkit_vit.vit import PRESETS, ViT

__all__ = ["LAYER_NORM_EPS", "PRESETS", "Block", "LinearHead", "MLPHead", "ViT", "sincos2d"]
