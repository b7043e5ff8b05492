"""Multimodal JEPA: image patches and a label token in one attention stack.

Trained with the LeJEPA loss on views of an image alone, of the image with its label, and of the label alone; then
asked for the label it saw (M1: the label that changes an image's embedding least, M2: the nearest label).
"""

from typing import Annotated, Literal

import torch

from vitkit import Run, backbones, evaluators, heads, losses
from vitkit.augment import Compose, RandomAffine
from vitkit.schedule import warmup_cosine
from vitkit_jepa import JEPA


def main(
    run: Run,
    dataset: Annotated[str, "mnist, fashion_mnist, digits, ...; auto: mnist, or digits where it cannot be had"] = "auto",
    epochs: Annotated[int, "passes over the training images"] = 50,
    batch_size: Annotated[int, "images a step"] = 256,
    lr: Annotated[float, "peak learning rate"] = 1e-3,
):
    """Train, evaluate every few epochs, save."""
