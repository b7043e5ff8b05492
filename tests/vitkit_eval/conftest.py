"""A small dataset whose classes a linear probe can tell apart, and a model whose mode and random state show."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitkit.data import ImageDataset, Stored, from_store


def build_shades(train: int = 120, test: int = 45, classes: int = 3) -> ImageDataset:
    """Images whose brightness says the class, with noise."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", train), ("test", test), ("val", test)):
        labels = torch.arange(n) % classes
        noise = torch.randint(0, 60, (n, 1, 4, 4), generator=generator)
        tensors[f"{split}.images"] = (labels.view(-1, 1, 1, 1) * (180 // (classes - 1)) + noise).to(torch.uint8)
        tensors[f"{split}.labels"] = labels
    return from_store(Stored("shades", [f"shade {i}" for i in range(classes)], tensors))


class Encoder(nn.Module):
    """Pixels as features; it draws random numbers in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(16)
        self.weight = nn.Parameter(torch.ones(16))

    def encode_image(self, images: Tensor) -> Tensor:
        torch.rand(1)
        return self.dropout(self.norm(images.flatten(1))) * self.weight


@pytest.fixture
def shades() -> Callable[..., ImageDataset]:
    return build_shades


@pytest.fixture
def dataset() -> ImageDataset:
    return build_shades()


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()
