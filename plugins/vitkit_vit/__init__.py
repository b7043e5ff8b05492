"""The vision transformer and the plain heads: backbone `vit`, heads `linear` and `mlp`."""

from vitkit_vit.heads import LinearHead, MLPHead
from vitkit_vit.layers import LAYER_NORM_EPS, MLP, Block, normalise
from vitkit_vit.positions import sincos2d
from vitkit_vit.products import attend, attention_weights, drop
from vitkit_vit.tokens import gather_tokens, join_tokens
from vitkit_vit.vit import PRESETS, ViT
from vitkit_vit.windows import from_windows, relative_index, resize_table, shift_mask, to_windows

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
    "from_windows",
    "gather_tokens",
    "join_tokens",
    "normalise",
    "relative_index",
    "resize_table",
    "shift_mask",
    "sincos2d",
    "to_windows",
]
