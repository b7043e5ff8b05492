"""MobileViT: the outputs of timm with the same weights, from its files; batch norm; sizes that patches do not divide."""

import pytest
import timm
import torch
from published import close, images, randomised, written

import vitkit
from vitkit.errors import UsageError
from vitkit_zoo.mobilevit import PRESETS, MobileViT, divisible


def timm_model():
    return randomised(timm.create_model("mobilevit_xxs", num_classes=5))


def tokens(features):
    return features.flatten(2).mT


@pytest.mark.parametrize("size", [(64, 64), (80, 112)], ids=str)
def test_timms_weights_give_timms_tokens_and_features(tmp_path, size):
    """At 80×112 the last maps are 5×7 and 3×4, which 2×2 patches do not divide."""
    reference, backbone, x = timm_model(), MobileViT(preset="xxs", img_size=64).eval(), images(2, 3, *size)
    report = vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    assert (report.missing, report.changed) == ([], [])
    assert {line.split()[0] for line in report.unused} == {"head.fc.weight", "head.fc.bias"}
    features = reference.forward_features(x)
    close(backbone(x), tokens(features))
    close(backbone.encode_image(x), reference.forward_head(features, pre_logits=True))
    expected = reference.stem(x)
    for actual, stage in zip(backbone.forward_features(x, [1, 2, 3, 4]), reference.stages, strict=False):
        expected = stage(expected)
        close(actual, tokens(expected))
    assert backbone.grid_after(5, size) == tuple(features.shape[2:])


def test_gradients_and_running_statistics_are_timms():
    reference, backbone = timm_model().double().train(), MobileViT(preset="xxs", img_size=32).double().train()
    backbone.load_state_dict({name: value for name, value in reference.state_dict().items() if not name.startswith("head.")})
    x = images(4, 3, 64, 64).double()
    actual, expected = backbone(x), tokens(reference.forward_features(x))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    weights = torch.randn_like(actual)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in backbone.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-9 + 1e-6 * scale)
    buffers = dict(reference.named_buffers())
    for name, buffer in backbone.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_timms_models_and_have_the_parameters_of_the_docstring(preset):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in MobileViT(preset=preset, img_size=64).parameters())
        if "_32" not in preset:
            assert count == sum(p.numel() for p in timm.create_model(f"mobilevit_{preset}", num_classes=0).parameters())
    assert f"{count:,}" in str(MobileViT.__doc__)


def test_channels_are_rounded_as_timm_rounds_them():
    channels = (3, 8, 11, 12, 20, 36, 60, 100)
    assert [divisible(count) for count in channels] == [timm.layers.make_divisible(count) for count in channels]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": [0, 0, 66, 96]}, "num_heads=4 of stage 3 does not divide its width 66; take 3 heads or another width"),
        ({"dims": [0, 0, 0, 96]}, "dims is 0; expected at least 1"),
        ({"widths": [8, 8]}, "the stages do not agree in number: .*widths: 2"),
        ({"expansion": 0}, "expansion is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, message):
    with pytest.raises(UsageError, match=message):
        MobileViT(preset="tiny_32", **arguments)
