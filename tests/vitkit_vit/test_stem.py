import pytest
import torch
from torch import nn

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit_vit import ViT
from vitkit_vit.stem import ConvStem

SMALL = {"img_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "dropout": 0.0}


def test_it_is_convolutions_norms_and_gelu() -> None:
    torch.manual_seed(0)
    stem = ConvStem(3, 32, 4)
    for norm in stem.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = images = torch.randn(2, 3, 16, 24)
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        x = nn.functional.conv2d(x, conv.weight, stride=2, padding=1)
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = nn.functional.gelu(x)
    expected = stem.proj(x)  # (b d h/4 w/4)
    assert expected.shape == (2, 32, 4, 6)
    torch.testing.assert_close(stem(images), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_the_grid_of_tokens_is_that_of_patches(patch_size: int) -> None:
    torch.manual_seed(0)
    model = backbones.build("vit", **SMALL, patch_size=patch_size, stem="conv")
    images = torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 1 + (16 // patch_size) ** 2, 32)
    keep = torch.tensor([[0], [1]])
    assert model(images, keep=keep).shape == (2, 2, 32)
    assert model.attention_maps(images).shape[-1] == 1 + model.num_patches


def test_tokens_see_beyond_their_patch_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    stem = ConvStem(1, 16, 4)
    images = torch.zeros(1, 1, 8, 8)
    moved = images.clone()
    moved[..., 3] = torch.randn(8)  # the last column of the left patches
    assert not torch.allclose(stem(images)[:, 1], stem(moved)[:, 1])
    stem(torch.randn(2, 1, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in stem.parameters())


def test_a_batch_makes_no_difference_to_an_image() -> None:
    torch.manual_seed(0)
    model = ViT(**SMALL, stem="conv").train()
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 7, "img_size": 28}, "patch_size=7 is one position, expected a power of two from 2 on; take patch_size=4"),
        ({"patch_size": 1}, "patch_size=1 is one position, expected a power of two from 2 on; take patch_size=2"),
        ({"patch_size": 8, "embed_dim": 30}, "halves embed_dim=30 2 times; take a multiple of 4"),
        ({"stem": "pool"}, "stem is 'pool'; expected 'patch', 'conv'"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ViT(**{**SMALL, "stem": "conv", **kwargs})
