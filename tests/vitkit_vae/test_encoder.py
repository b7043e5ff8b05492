from typing import Any

import pytest
import torch
from torch import Tensor

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit_vae import LOG_VAR_LIMIT, VAEEncoder, sample_latent

SMALL: dict[str, Any] = {
    "img_size": 16, "in_chans": 1, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "latent_dim": 6,
    "embedding_dim": 5,
}  # fmt: skip


def encoder(**kwargs: Any) -> VAEEncoder:
    torch.manual_seed(0)
    return VAEEncoder(**{**SMALL, **kwargs})


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kwargs", [{}, {"depths": [1, 2]}, {"stem": "conv", "pool": "cls"}, {"checkpoint": True}])
def test_shapes_of_tokens_latent_and_embedding(kwargs: dict[str, Any]) -> None:
    model = backbones.build("vae_encoder", **SMALL, **kwargs)
    mu, log_var = model.encode_latent(images())
    assert mu.shape == log_var.shape == (3, model.latent_dim) == (3, 6)
    assert model.embed(mu).shape == model.encode_image(images()).shape == (3, model.embedding_dim) == (3, 5)
    assert model(images()).shape == (3, model.vit.num_prefix_tokens + 4, model.embed_dim)
    assert (model.img_size, model.in_chans) == ((16, 16), 1)
    assert model.vit.attention_maps(images()).shape[1] == 2


def test_the_embedding_is_that_of_the_mean() -> None:
    model = encoder()
    torch.testing.assert_close(model.encode_image(images()), model.embed(model.encode_latent(images())[0]))


def test_hierarchical_features_are_the_pooled_tokens_of_each_depth() -> None:
    model = encoder(depths=[1, 2])
    first, second = model.vit.forward_features(images(), [1, 2])
    expected = torch.cat([first.mean(1), second.mean(1)], dim=1)
    torch.testing.assert_close(model.encode_features(images()), expected)
    torch.testing.assert_close(encoder().encode_features(images(), [2]), encoder().vit.encode_image(images()))
    model.encode_latent(images())[0].sum().backward()
    assert model.to_latent.weight.grad is not None
    assert model.to_latent.weight.grad[:6, :16].abs().sum() > 0


def test_the_logarithm_of_the_variance_keeps_to_its_range_whatever_comes() -> None:
    model = encoder()
    for bias in (1e6, -1e6, float("inf")):
        torch.nn.init.constant_(model.to_latent.bias, bias)
        _, log_var = model.encode_latent(images())
        assert log_var.abs().max() <= LOG_VAR_LIMIT
        assert (0.5 * log_var).exp().isfinite().all()
    torch.nn.init.zeros_(model.to_latent.bias)
    features = model.encode_features(images())
    given = features @ model.to_latent.weight[6:].T
    torch.testing.assert_close(model.encode_latent(images())[1], 10 * torch.tanh(given / 10), atol=1e-6, rtol=1e-5)


def test_latents_are_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mu, log_var = encoder().encode_latent(images())
    assert mu.dtype == log_var.dtype == torch.float32


def test_samples_have_the_mean_and_variance_asked_for() -> None:
    torch.manual_seed(0)
    mu, log_var = torch.tensor([[1.0, -2.0]]).expand(50_000, -1), torch.tensor([[0.0, 2.0]]).expand(50_000, -1)
    z = sample_latent(mu, log_var)
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(0), log_var[0].exp(), atol=0, rtol=0.03)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpoint in (False, True):
        model = encoder(checkpoint=checkpoint).train()
        model.encode_image(images()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*grads, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)


def test_all_depths_are_pooled_after_every_block() -> None:
    torch.manual_seed(0)
    everywhere = encoder(depths="all")
    assert everywhere.depths == tuple(range(1, len(everywhere.vit.blocks) + 1))
    assert everywhere.to_latent.in_features == len(everywhere.depths) * everywhere.embed_dim


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latent_dim": 0}, "latent_dim is 0; expected at least 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0; expected at least 1"),
        ({"depths": [0, 2]}, r"depths are \[0, 2\]; expected numbers of blocks in 1 … 2"),
        ({"depths": []}, r"depths are \[\]; expected numbers of blocks in 1 … 2"),
    ],
)
def test_wrong_arguments_say_what_was_expected(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoder(**kwargs)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 28, 28)])
def test_images_of_another_size_or_channel_count_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"expected \(batch, 1, 16, 16\); resize them"):
        encoder().encode_latent(torch.zeros(shape))
