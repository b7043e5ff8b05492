"""The multimodal JEPA: backbone `multimodal_vit`, losses `lejepa` and `sigreg`, evaluator `label_retrieval`."""

from vitkit_jepa.encoder import MultimodalViT
from vitkit_jepa.lejepa import LeJEPALoss
from vitkit_jepa.sigreg import SIGReg

__all__ = ["LeJEPALoss", "MultimodalViT", "SIGReg"]
