import pytest
import torch
from torch import nn

from vitkit.batches import ImageSplit, Preparation
from vitkit.errors import UsageError
from vitkit_vae import PatchFeatures, VAEEncoder


def split(count: int = 40) -> ImageSplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSplit(images, torch.arange(count) % 4, Preparation((1, 8, 8), (0.5,), (0.3,)))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_the_standardised_tokens_of_a_block(pool: str) -> None:
    torch.manual_seed(0)
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, pool=pool).train()  # type: ignore[arg-type]
    features = PatchFeatures(backbone, split(), depth=1)
    assert backbone.training
    (batch,) = split().batches(40).epoch(0)
    found = features.encode_image(batch["images"])
    assert found.shape == (40, 4 * 8)
    torch.testing.assert_close(found.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(32), atol=1e-4, rtol=0)
    (tokens,) = backbone.vit.forward_features(batch["images"], [1])
    expected = tokens[:, -4:].flatten(1)
    expected = (expected - expected.mean(0)) / expected.std(0, correction=0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_said() -> None:
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(UsageError, match="Linear has no vit whose patches could be taken; give a 'vae_encoder'"):
        PatchFeatures(nn.Linear(1, 1), split())
    with pytest.raises(UsageError, match="the split to standardise by holds no images"):
        PatchFeatures(backbone, split().subset(torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(UsageError, match=r"depths \[3\] lie outside 1 … 1"):
        PatchFeatures(backbone, split(), depth=3)
