"""CLIP over pairs of images and captions: the pairs, both towers, the losses and the model."""

from vitkit.training import GradCache
from vitkit_clip.assembly import AUGMENTS, MIXES, build_clip
from vitkit_clip.clip import CLIP
from vitkit_clip.contrastive import FocalNCE, HardNegativeNCE, InfoNCE, MarginTriplet, SigLIP
from vitkit_clip.image import PairViT
from vitkit_clip.multitask import PairMultiTask
from vitkit_clip.pair_backbone import PairBackbone
from vitkit_clip.pairs import Pairs, captions
from vitkit_clip.retrieval import PairRetrieval
from vitkit_clip.text import TextTransformer, vocabulary_of

__all__ = [
    "AUGMENTS",
    "CLIP",
    "MIXES",
    "FocalNCE",
    "GradCache",
    "HardNegativeNCE",
    "InfoNCE",
    "MarginTriplet",
    "PairBackbone",
    "PairMultiTask",
    "PairRetrieval",
    "PairViT",
    "Pairs",
    "SigLIP",
    "TextTransformer",
    "build_clip",
    "captions",
    "vocabulary_of",
]
