"""A backbone as a function of images to pooled features."""

from typing import Any

from torch import Tensor, nn


class Pooled(nn.Module):
    """Images `(b c h w)` → `backbone.encode_image(images)` `(b d)`, so that a `MomentumTeacher` can copy and call it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @staticmethod
    def encode(backbone: Any, images: Tensor) -> Tensor:
        """The backbone's pooled features `(b d)`."""
        features: Tensor = backbone.encode_image(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(self.backbone, images)
