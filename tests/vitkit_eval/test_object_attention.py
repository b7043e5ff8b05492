"""Attention within an object's box: even attention has the box's area, attention to the object alone has all of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitkit import backbones, datasets, evaluators
from vitkit.errors import UsageError
from vitkit_eval.object_attention import compose


class Attends(nn.Module):
    """One head that attends to patches of 4 pixels by how much their pixels differ, times `sharpness`."""

    def __init__(self, sharpness):
        super().__init__()
        self.sharpness = sharpness

    def forward(self, x):
        patches = F.unfold(x, 4, stride=4).mT  # (b n c·16)
        scores = patches.std(dim=2, keepdim=True)[:, None] * self.sharpness
        F.scaled_dot_product_attention(torch.ones_like(scores), scores, scores)
        return patches


def digits(size=32):
    return datasets.build("digits").resized(size)


def test_even_attention_has_the_area_of_the_box():
    scores = evaluators.build("object_attention", images=40)(Attends(0.0), digits())
    assert set(scores) == {"object_attention_plain", "object_attention_clutter"}
    for name, value in scores.items():
        assert value == pytest.approx(0.25, abs=1e-5)
        assert scores.protocols[name].chance == 0.25
        assert (scores.protocols[name].split, scores.protocols[name].samples) == ("test", 40)


def test_attention_to_what_differs_finds_objects_on_a_plain_ground():
    scores = evaluators.build("object_attention", images=40, scale=0.5)(Attends(30.0), digits())
    assert scores["object_attention_plain"] > 0.7
    figure = scores.figures["object_attention"]
    assert figure.images.shape == (16, 1, 32, 32)
    assert figure.maps.shape == (16, 8, 8)
    assert figure.captions[0].startswith("plain: ")
    assert figure.captions[8].startswith("clutter: ")


def test_objects_lie_in_their_boxes_on_the_ground():
    pixels = torch.rand(5, 3, 16, 16) * 0.5 + 0.5
    for ground, colours in (("plain", 1), ("clutter", 30)):
        images, masks = compose(pixels, ground, scale=0.5, generator=torch.Generator().manual_seed(0))
        again, _ = compose(pixels, ground, scale=0.5, generator=torch.Generator().manual_seed(0))
        assert torch.equal(images, again)
        assert masks.sum(dim=(1, 2)).tolist() == [64.0] * 5
        small = F.interpolate(pixels, size=(8, 8), mode="bilinear", antialias=True)
        for image, mask, one in zip(images, masks, small, strict=True):
            torch.testing.assert_close(image[:, mask == 1], one.flatten(1))
            outside = image[:, mask == 0].T.unique(dim=0)
            assert len(outside) == 1 if colours == 1 else len(outside) > colours
    places = [mask.nonzero()[0].tolist() for mask in masks]
    assert len({tuple(place) for place in places}) > 1


def test_a_transformer_is_measured_with_its_untrained_self_near_chance():
    torch.manual_seed(0)
    backbone = backbones.build("vit", img_size=16, in_chans=1, embed_dim=16, depth=2, num_heads=2)
    model = nn.Module()
    model.backbone = backbone
    scores = evaluators.build("object_attention", images=20)(model, digits(16), "val")
    assert 0.15 < scores["val_object_attention_plain"] < 0.35


def test_without_attention_and_for_wrong_arguments_it_says_so():
    with pytest.raises(UsageError, match="computes no attention between tokens"):
        evaluators.build("object_attention", images=4)(backbones.build("timm/test_resnet", in_chans=1), digits(64))
    with pytest.raises(UsageError, match=r"scale is 1.0; expected a number in \(0, 1\)"):
        evaluators.build("object_attention", scale=1.0)
