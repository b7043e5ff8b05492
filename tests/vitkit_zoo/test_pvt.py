"""PVT v2: the outputs of timm with the same weights, from its files; sizes that reductions do not divide."""

import re

import pytest
import timm
import torch
from published import close, images, randomised, written
from timm.models import pvt_v2

import vitkit
from vitkit.errors import UsageError
from vitkit_zoo.pvt import PRESETS, PVT

LISTS = {"depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "mlp_ratios": [2, 3, 2, 2]}
WIDTHS, REDUCTIONS = [8, 12, 16, 24], [8, 4, 2, 1]


def ours(**arguments):
    return PVT(**{"patch_size": 4, "img_size": 64, "widths": WIDTHS, "reductions": REDUCTIONS, **LISTS, **arguments}).eval()


def timm_model(**arguments):
    return randomised(pvt_v2.PyramidVisionTransformerV2(num_classes=5, embed_dims=WIDTHS, sr_ratios=REDUCTIONS, **{**LISTS, **arguments}))


@pytest.mark.parametrize("size", [(64, 64), (75, 50)], ids=str)
@pytest.mark.parametrize("reduction", ["convolution", "pool"])
def test_timms_weights_give_timms_tokens_and_features(tmp_path, size, reduction):
    """A map of 19×13 reduced by 8 is among the sizes, whose keys cover 16×8."""
    reference, backbone, x = timm_model(linear=reduction == "pool"), ours(reduction=reduction), images(2, 3, *size)
    report = vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    assert (report.missing, report.changed) == ([], [])
    assert {line.split()[0] for line in report.unused} == {"head.weight", "head.bias"}
    features, stages = reference.forward_intermediates(x)
    close(backbone(x), features.flatten(2).mT)
    close(backbone.encode_image(x), reference.forward_head(features, pre_logits=True))
    for actual, expected in zip(backbone.forward_features(x, [1, 2, 3, 4]), stages, strict=True):
        close(actual, expected.flatten(2).mT)
    assert backbone.grid_after(2, size) == tuple(stages[1].shape[2:])


def test_the_authors_names_are_read(tmp_path):
    """timm reads them too: its filter gives the state that is compared."""
    reference, backbone = timm_model(), ours()
    state = {}
    for name, value in reference.state_dict().items():
        name = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}.", name.replace("dwconv", "dwconv.dwconv"))
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"block{int(m[1]) + 1}.{m[2]}.", name)
        name = re.sub(r"^stages\.(\d)\.norm\.", lambda m: f"norm{int(m[1]) + 1}.", name)
        state[name.replace("patch_embed.", "patch_embed1.")] = value
    filtered = pvt_v2.checkpoint_filter_fn(dict(state), reference)
    assert all(torch.equal(value, filtered[name]) for name, value in reference.state_dict().items())
    report = vitkit.load_weights(backbone, written(tmp_path, state))
    assert report.missing == []
    close(backbone(images(1, 3, 64, 64)), reference.forward_features(images(1, 3, 64, 64)).flatten(2).mT)


def test_gradients_are_timms():
    reference, backbone = timm_model().double(), ours().double()
    backbone.load_state_dict({name: value for name, value in reference.state_dict().items() if not name.startswith("head")})
    x = images(2, 3, 64, 64).double()
    weights = torch.randn_like(backbone(x))
    (backbone(x) * weights).sum().backward()
    (reference.forward_features(x).flatten(2).mT * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_timms_models_and_have_the_parameters_of_the_docstring(preset):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PVT(preset=preset, img_size=64 if "32" in preset else 225).parameters())
        if "_32" not in preset:
            assert count == sum(p.numel() for p in timm.create_model(f"pvt_v2_{preset}", num_classes=0).parameters())
    assert f"{count:,}" in str(PVT.__doc__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": [1, 5, 2, 4]}, "num_heads=5 of stage 2 does not divide its width 12; take 4 heads or another width"),
        ({"img_size": 28}, r"images of 28×28 pixels are too small: this PVT takes 29×29 or more"),
        ({"reductions": [8, 4]}, "the stages do not agree in number: .*reductions: 2"),
        ({"reduction": "mean"}, "reduction is 'mean'; expected 'convolution', 'pool'"),
        ({"mlp_ratios": [1, 1, 1, 0]}, "mlp_ratios is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, message):
    with pytest.raises(UsageError, match=message):
        ours(**arguments)


def test_the_smallest_image_has_keys_in_every_stage():
    assert ours(img_size=29)(images(1, 3, 29, 29)).isfinite().all()
