"""The vision transformer and the plain heads: backbone `vit`, heads `linear` and `mlp`."""

from vitkit_vit.heads import LinearHead, MLPHead
from vitkit_vit.layers import MLP, Block, attend, normalise
from vitkit_vit.vit import PRESETS, ViT

__all__ = ["MLP", "PRESETS", "Block", "LinearHead", "MLPHead", "ViT", "attend", "normalise"]
