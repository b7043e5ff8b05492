"""The vision transformer and the plain heads: backbone `vit`, heads `linear` and `mlp`."""

from vitkit_vit.heads import LinearHead, MLPHead
from vitkit_vit.layers import LAYER_NORM_EPS, MLP, Block, attend, attention_weights, drop, normalise
from vitkit_vit.positions import sincos2d
from vitkit_vit.tokens import gather_tokens, join_tokens
from vitkit_vit.vit import PRESETS, ViT

__all__ = [
    "LAYER_NORM_EPS",
    "MLP",
    "PRESETS",
    "Block",
    "LinearHead",
    "MLPHead",
    "ViT",
    "attend",
    "attention_weights",
    "drop",
    "gather_tokens",
    "join_tokens",
    "normalise",
    "sincos2d",
]
