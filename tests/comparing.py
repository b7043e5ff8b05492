"""A model whose loss compares samples, for tests of batches that are put together."""

import torch
from torch import nn

from vitkit.training import GradCacheable


class Comparing(GradCacheable):
    """A loss that is no mean over samples: the variance of a batch's outputs, far from what its points add up to."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(dropout), nn.Linear(16, 1))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward_features(self, batch):
        return {"z": self.net(batch["images"])[:, 0], "y": batch["labels"]}

    def compute_loss(self, embedded):
        z, y = embedded["z"] * self.scale, embedded["y"]
        variance = (z.std() - y.std()).square()
        return {"loss": variance + (z - y).square().mean().sqrt(), "variance": variance.detach()}
