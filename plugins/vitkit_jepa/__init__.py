"""The multimodal JEPA: its backbone, its losses, its model, and label retrieval."""

from vitkit_jepa.encoder import MultimodalViT
from vitkit_jepa.jepa import JEPA
from vitkit_jepa.lejepa import LeJEPALoss
from vitkit_jepa.retrieval import LabelRetrieval
from vitkit_jepa.sigreg import SIGReg

__all__ = ["JEPA", "LabelRetrieval", "LeJEPALoss", "MultimodalViT", "SIGReg"]
