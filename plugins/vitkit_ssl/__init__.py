"""Learning without labels: masked autoencoders, DINO, SimCLR, BYOL and LeJEPA on images, with their heads, losses and monitors."""

from vitkit_ssl.byol import BYOL, BYOLLoss
from vitkit_ssl.decoder import MAEDecoder
from vitkit_ssl.dino import DINO, DINOHead
from vitkit_ssl.dino_loss import DINOLoss, sinkhorn
from vitkit_ssl.joint import JointEmbedding, Supervised
from vitkit_ssl.koleo import KoLeoLoss
from vitkit_ssl.mae import MAE, reconstructions
from vitkit_ssl.masking import encode_views, patchify, unpatchify
from vitkit_ssl.methods import METHODS, Method, build_method, views_of
from vitkit_ssl.monitors import Monitors, RawPixels, raw_pixel_scores
from vitkit_ssl.nt_xent import NTXent
from vitkit_ssl.reconstruction import MaskedReconstruction
from vitkit_ssl.views import Augment, augmentation, multi_crop

__all__ = [
    "BYOL",
    "DINO",
    "MAE",
    "METHODS",
    "Augment",
    "BYOLLoss",
    "DINOHead",
    "DINOLoss",
    "JointEmbedding",
    "KoLeoLoss",
    "MAEDecoder",
    "MaskedReconstruction",
    "Method",
    "Monitors",
    "NTXent",
    "RawPixels",
    "Supervised",
    "augmentation",
    "build_method",
    "encode_views",
    "multi_crop",
    "patchify",
    "raw_pixel_scores",
    "reconstructions",
    "sinkhorn",
    "unpatchify",
    "views_of",
]
