"""InfoNCE over several batches: every pair against all of them, and with a classifier of the halves beside it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkit import backbones, heads, losses
from vitkit.training import Accumulated, GradCache
from vitkit_clip import CLIP, captions, vocabulary_of

CLASSES = ["cat", "dog", "fox"]


def clip(loss: str, classify: bool) -> CLIP:
    torch.manual_seed(0)
    said = captions(CLASSES)
    arguments: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = backbones.build("pair_vit", img_size=8, in_chans=1, preset="baseline", **arguments)
    text = backbones.build("text_transformer", vocabulary=vocabulary_of(said), embed_dim=16, depth=1, num_heads=2)
    projectors = [heads.build("linear", in_dim=tower.embed_dim, out_dim=8) for tower in (backbone, text)]
    classifier = heads.build("linear", in_dim=backbone.embed_dim, out_dim=3) if classify else None
    objective = losses.build("pair_multi_task", contrastive=loss) if classify else losses.build(loss)
    return CLIP(backbone, text, *projectors, objective, said, classifier)


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randint(3, (2, 12), generator=generator)
    return {
        "images": torch.randn(12, 1, 8, 16, generator=generator), "labels": 3 * left + right, "left": left, "right": right,
    }  # fmt: skip


def parts() -> list[dict[str, Tensor]]:
    return [{name: value[rows] for name, value in whole().items()} for rows in (slice(5), slice(5, 12))]


def gradient(model: nn.Module, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}, gradients


@pytest.mark.parametrize("classify", [False, True])
@pytest.mark.parametrize("loss", ["info_nce", "siglip", "hard_negative_nce", "focal_nce", "margin_triplet"])
def test_accumulated_pairs_are_compared_with_all(loss: str, classify: bool) -> None:
    model = clip(loss, classify)
    expected = gradient(model, model(whole()))
    model = clip(loss, classify)
    torch.testing.assert_close(gradient(model, Accumulated(model)(parts(), [1, 2])), expected, rtol=1e-5, atol=1e-5)
    model = clip(loss, classify)
    torch.testing.assert_close(gradient(model, GradCache(model, 5)(whole())), expected, rtol=1e-5, atol=1e-5)
    model = clip(loss, classify)
    separate = sum(float(model(part)["loss"].detach()) for part in parts()) / 2
    assert abs(separate - float(expected[0]["loss"])) > 1e-3
