"""ConvNeXt: the outputs of timm and torchvision with the same weights, from their files."""

import re

import pytest
import timm
import torch
from published import close, images, randomised, written
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt

import vitkit
from vitkit.errors import UsageError
from vitkit_zoo.convnext import PRESETS, ConvNeXt

SIZES = {"depths": [1, 2, 1, 1], "widths": [8, 12, 16, 24]}


def ours(**arguments):
    return ConvNeXt(**{"patch_size": 4, "img_size": 64, **SIZES, **arguments}).eval()


def timm_model(**arguments):
    return randomised(timm.models.ConvNeXt(depths=SIZES["depths"], dims=SIZES["widths"], num_classes=5, **arguments))


def torchvision_model():
    widths, depths = SIZES["widths"], SIZES["depths"]
    blocks = [CNBlockConfig(width, after, depth) for width, after, depth in zip(widths, [*widths[1:], None], depths, strict=True)]
    return randomised(TorchvisionConvNeXt(blocks, num_classes=5))


@pytest.mark.parametrize("size", [(64, 64), (75, 50)], ids=str)
@pytest.mark.parametrize("conv_mlp", [False, True])
def test_timms_weights_give_timms_tokens_and_features(tmp_path, size, conv_mlp):
    reference, backbone, x = timm_model(conv_mlp=conv_mlp), ours(), images(2, 3, *size)
    report = vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    assert (report.missing, report.changed) == ([], [])
    assert {line.split()[0] for line in report.unused} == {"head.fc.weight", "head.fc.bias"}
    features = reference.forward_features(x)
    close(backbone(x), features.flatten(2).mT)
    close(backbone.encode_image(x), reference.forward_head(features, pre_logits=True))
    for actual, expected in zip(backbone.forward_features(x, [1, 2, 3]), reference.forward_intermediates(x)[1], strict=False):
        close(actual, expected.flatten(2).mT)


@pytest.mark.parametrize("size", [(64, 64), (75, 50)], ids=str)
def test_torchvisions_weights_give_torchvisions_features(tmp_path, size):
    reference, backbone, x = torchvision_model(), ours(), images(2, 3, *size)
    report = vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    assert (report.missing, report.changed) == ([], [])
    assert {line.split()[0] for line in report.unused} == {"classifier.2.weight", "classifier.2.bias"}
    close(backbone(x), reference.features(x).flatten(2).mT)
    close(backbone.encode_image(x), reference.classifier[0](reference.avgpool(reference.features(x))).flatten(1))


def test_the_authors_names_are_read(tmp_path):
    """timm reads them too: its filter gives the state that is compared."""
    reference = timm_model()
    state = {}
    for name, value in reference.state_dict().items():
        name = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", re.sub(r"^stem\.", "downsample_layers.0.", name))
        name = re.sub(r"^(stages\.\d+)\.blocks\.", r"\1.", name).replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        state[name.replace("head.norm", "norm").replace("head.fc", "head")] = value
    filtered = timm.models.convnext.checkpoint_filter_fn(dict(state), reference)
    assert all(torch.equal(value, filtered[name]) for name, value in reference.state_dict().items())
    backbone = ours()
    torch.save({"model": state}, tmp_path / "w.pth")
    assert vitkit.load_weights(backbone, tmp_path / "w.pth").missing == []
    close(backbone.encode_image(images(1, 3, 64, 64)), reference.forward_head(reference.forward_features(images(1, 3, 64, 64)), True))


def test_other_channels_are_summed_and_other_widths_are_refused(tmp_path):
    file = written(tmp_path, timm_model().state_dict())
    grey = ours(in_chans=1)
    report = vitkit.load_weights(grey, file)
    assert report.changed == ["stem.0.weight (8, 3, 4, 4) → (8, 1, 4, 4): channels summed"]
    x, reference = images(1, 1, 64, 64), timm_model()
    close(grey(x), reference.forward_features(x.expand(-1, 3, -1, -1)).flatten(2).mT)
    with pytest.raises(UsageError, match=r"no weight of .* fits this backbone: .*; build the backbone with the file's preset"):
        vitkit.load_weights(ours(widths=[7, 9, 11, 13]), file)


def test_gradients_are_timms():
    reference, backbone = timm_model().double(), ours().double()
    state = {name.replace("head.norm", "norm"): value for name, value in reference.state_dict().items()}
    backbone.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    x = images(2, 3, 64, 64).double()
    (backbone(x) * 3).square().sum().backward()
    (reference.forward_features(x) * 3).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in backbone.named_parameters():
        if not name.startswith("norm."):
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_timms_models_and_have_the_parameters_of_the_docstring(preset):
    with torch.device("meta"):
        model = ConvNeXt(preset=preset, img_size=64)
        count = sum(parameter.numel() for parameter in model.parameters())
        if "_32" not in preset:
            assert count == sum(p.numel() for p in timm.create_model(f"convnext_{preset}", num_classes=0).parameters())
    if preset not in ("atto", "femto", "pico", "nano"):
        assert f"{count:,}" in str(ConvNeXt.__doc__)


def test_a_block_is_skipped_for_whole_samples_and_the_mean_stays():
    torch.manual_seed(0)
    model = ConvNeXt(patch_size=2, depths=[2], widths=[4], drop_path=0.25, layer_scale=1.0, img_size=8).train()
    x = images(1, 3, 8, 8).expand(400, -1, -1, -1)
    with torch.no_grad():
        drawn, expected = model(x), model.eval()(x[:1])
    assert len(drawn.unique(dim=0)) == 2  # the first block is never skipped
    assert (drawn == drawn[0]).flatten(1).all(1).float().mean().item() in (pytest.approx(0.25, abs=0.07), pytest.approx(0.75, abs=0.07))
    close(drawn.mean(0, keepdim=True), expected, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [8, 8]}, r"the stages do not agree in number: depths: 4, widths: 2; give one value for each stage"),
        ({"img_size": 24}, r"images of 24×24 pixels are too small: this ConvNeXt takes 32×32 or more; resize them, or take a preset"),
        ({"img_size": [4, 4, 4]}, r"img_size is \[4, 4, 4\], expected a number of pixels or \(height, width\)"),
        ({"depths": [1, 0, 1, 1]}, "depths is 0; expected at least 1"),
        ({"drop_path": 1.0}, r"drop_path is 1.0; expected a number in \[0, 1\)"),
        ({"preset": "small32"}, "preset is 'small32'; did you mean 'small_32'"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, message):
    with pytest.raises(UsageError, match=message):
        ours(**arguments)
