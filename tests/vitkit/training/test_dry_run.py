"""What a dry run says of a model."""

import pytest
import torch
from torch import nn

from vitkit import backbones
from vitkit.training.dry_run import _tokens


@pytest.mark.parametrize(("pool", "length"), [("cls", 17), ("mean", 16)])
def test_tokens_are_those_that_the_blocks_see_however_they_are_pooled(pool: str, length: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = backbones.build("multimodal_vit", img_size=16, embed_dim=32, depth=2, num_heads=2, pool=pool)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            labels = torch.zeros(len(images), dtype=torch.int64)
            return self.encoder.encode_image(images) + self.encoder.encode_multimodal(images, labels)

    model = Model()
    with _tokens(model) as tokens:
        model(torch.zeros(3, 1, 16, 16))
    assert tokens == {length: 3, length + 1: 3}
    with _tokens(model) as tokens:
        pass
    assert tokens == {}
