"""The multimodal JEPA: backbone `multimodal_vit`, losses `lejepa` and `sigreg`, evaluator `label_retrieval`."""

from vitkit_jepa.encoder import MultimodalViT
from vitkit_jepa.jepa import JEPA
from vitkit_jepa.lejepa import LeJEPALoss
from vitkit_jepa.retrieval import LabelRetrieval
from vitkit_jepa.sigreg import SIGReg

__all__ = ["JEPA", "LabelRetrieval", "LeJEPALoss", "MultimodalViT", "SIGReg"]
