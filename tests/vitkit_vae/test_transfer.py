import pytest
import torch
from torch import nn

from vitkit import data, evaluators
from vitkit.data import ImageSplit, Preprocessing
from vitkit.errors import UsageError
from vitkit_vae import PatchFeatures, VAEEncoder


def split(count: int = 40) -> ImageSplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSplit(images, torch.arange(count) % 4, Preprocessing((1, 8, 8), (0.5,), (0.3,)))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_the_whitened_tokens_of_a_block(pool: str) -> None:
    torch.manual_seed(0)
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, pool=pool).train()
    features = PatchFeatures(backbone, split(100), depth=1, components=6)
    assert backbone.training
    (batch,) = split(100).batches(100).epoch(0)
    found = features.encode_image(batch["images"])
    assert found.shape == (100, 6)
    torch.testing.assert_close(found.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.T @ found / 100, torch.eye(6), atol=1e-3, rtol=0)
    (tokens,) = backbone.vit.forward_features(batch["images"], [1])
    tokens = tokens[:, -4:].flatten(1)
    tokens = (tokens - tokens.mean(0)) / tokens.std(0, correction=0)
    left, _, _ = torch.linalg.svd(tokens, full_matrices=False)  # whitened principal components are U·√n up to their signs
    torch.testing.assert_close(found.abs(), left[:, :6].abs() * 10, atol=1e-2, rtol=1e-2)


def test_there_are_no_more_components_than_images_or_numbers_allow() -> None:
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    assert PatchFeatures(backbone, split(5)).directions.shape == (32, 4)
    assert PatchFeatures(backbone, split(100)).directions.shape == (32, 32)


def test_whitening_stays_exact_under_autocast() -> None:
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        features = PatchFeatures(backbone, split(100), components=6)
        (batch,) = split(100).batches(100).epoch(0)
        found = features.encode_image(batch["images"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.T @ found / 100, torch.eye(6), atol=1e-2, rtol=0)


def test_what_does_not_fit_is_said() -> None:
    backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(UsageError, match="Linear has no vit, whose patches are the features; give a 'vae_encoder'"):
        PatchFeatures(nn.Linear(1, 1), split())
    with pytest.raises(UsageError, match="the split for the whitening holds 0 images; expected at least 2"):
        PatchFeatures(backbone, split().subset(torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(UsageError, match="components is 0; expected at least 1"):
        PatchFeatures(backbone, split(), components=0)
    with pytest.raises(UsageError, match=r"depths \[3\] lie outside 1 … 1"):
        PatchFeatures(backbone, split(), depth=3)


def test_transfer_by_patches_is_transfer_of_their_features() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = VAEEncoder(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    model.encode_image = model.backbone.encode_image
    dataset = data.build("digits")
    sizes = {"dataset": "digits", "train_size": 200, "test_size": 100}
    features = PatchFeatures(model.backbone, dataset.train)
    scores = evaluators.build("patch_transfer", **sizes)(model, dataset)
    assert scores == evaluators.build("transfer", **sizes)(features, dataset)
    by_embedding = evaluators.build("patch_transfer", features="embedding", **sizes)(model, dataset)
    assert by_embedding == evaluators.build("transfer", **sizes)(model, dataset)
    assert scores["transfer_knn_top1"] > by_embedding["transfer_knn_top1"]
    with pytest.raises(UsageError, match="features is 'patch', expected Literal"):
        evaluators.build("patch_transfer", features="patch")
