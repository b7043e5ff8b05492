"""The multimodal encoder: what its three ways to encode share, and how labels enter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit_jepa import MultimodalViT


def encoder(**kwargs: Any) -> MultimodalViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_classes": 4, "img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2
    }  # fmt: skip
    model: MultimodalViT = backbones.build("multimodal_vit", **(sizes | kwargs))
    return model.eval()


def trained(**kwargs: Any) -> MultimodalViT:
    """With label embeddings that differ, as after training."""
    model = encoder(**kwargs)
    torch.nn.init.normal_(model.label_embed.weight)
    return model


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_shapes(pool: str) -> None:
    model, x, labels = trained(pool=pool), images(), torch.tensor([0, 3, 3])
    assert model(x).shape == (3, 4 + (pool == "cls"), 16)
    for features in (model.encode_image(x), model.encode_label(labels), model.encode_multimodal(x, labels)):
        assert features.shape == (3, 16)


def test_mean_pooling_is_over_patches_and_label() -> None:
    model, x, labels = trained(), images(), torch.tensor([0, 3, 3])
    tokens = model(x, extra_tokens=model.label_tokens(labels))
    torch.testing.assert_close(model.encode_multimodal(x, labels), tokens.mean(dim=1))


def test_label_and_patches_attend_to_each_other() -> None:
    model, x = trained(), images(1)
    tokens = [model(x, extra_tokens=model.label_tokens(torch.tensor([k]))) for k in (0, 1)]
    assert not torch.allclose(tokens[0][:, :4], tokens[1][:, :4])  # patches see the label
    other = model(images(2)[1:], extra_tokens=model.label_tokens(torch.tensor([0])))
    assert not torch.allclose(tokens[0][:, 4:], other[:, 4:])  # the label sees the patches


def test_before_training_all_labels_are_one() -> None:
    model, labels = encoder(), torch.arange(4)
    features = model.encode_label(labels)
    assert torch.equal(features, features[:1].expand(4, -1))
    both = model.encode_multimodal(images(1).expand(4, -1, -1, -1), labels)
    assert torch.equal(both, both[:1].expand(4, -1))


def test_one_step_tells_labels_apart() -> None:
    model, labels = encoder().train(), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model.encode_label(labels) - model.encode_image(images(4)).detach()).square().mean().backward()
    optimizer.step()
    features = model.encode_label(labels)
    assert (torch.pdist(features) > 0).all()


def test_an_unknown_label_names_no_class() -> None:
    model = trained()
    nn_tokens = model.label_tokens(torch.tensor([-1, 2]))
    torch.testing.assert_close(nn_tokens[0, 0], model.label_type[0])
    torch.testing.assert_close(nn_tokens[1, 0], model.label_type[0] + model.label_embed.weight[2])


def test_keep_looks_at_the_named_patches_alone() -> None:
    model, x = trained(), images(1)
    keep, labels = torch.tensor([[0, 3]]), torch.tensor([1])
    blanked = x.clone()
    blanked[..., :4, 4:] = 9.0  # patch 1, which is not looked at
    torch.testing.assert_close(
        model.encode_multimodal(x, labels, keep=keep), model.encode_multimodal(blanked, labels, keep=keep)
    )
    torch.testing.assert_close(
        model.encode_image(x, keep=torch.arange(4)[None].flip(1)), model.encode_image(x), rtol=1e-5, atol=1e-5
    )


def test_label_attention_is_the_rollout_of_uniform_attention() -> None:
    model = trained(depth=1, registers=1)
    for parameter in model.vit.blocks[0].attn.qkv.parameters():
        torch.nn.init.zeros_(
            parameter
        )  # equal scores: each of 4 patches, the register and the label weighs 1/6
    maps = model.label_attention(images(), torch.tensor([0, 1, 2]))
    assert maps.shape == (3, 2, 2)
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 12))  # halved with the residual stream


def test_label_attention_with_rectangular_images_is_finite_and_at_most_one() -> None:
    model = trained(img_size=(8, 16))
    maps = model.label_attention(torch.randn(2, 1, 8, 16), torch.tensor([0, 1]))
    assert maps.shape == (2, 2, 4)
    assert ((maps > 0) & (maps.sum((1, 2), keepdim=True) <= 1)).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), r"label 4 is not one of this model's 4 classes, 0 … 3; build it with"),
        (torch.tensor([-2, 0]), "label -2 is not one"),
        (torch.tensor([0.0]), r"labels are torch.float32 \(1,\); expected int64 \(batch,\)"),
        (torch.tensor([[0]]), r"labels are torch.int64 \(1, 1\); expected int64 \(batch,\)"),
    ],
)
def test_wrong_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoder().encode_label(labels)


def test_wrong_number_of_classes() -> None:
    with pytest.raises(UsageError, match="num_classes is 0; expected at least 1"):
        encoder(num_classes=0)
