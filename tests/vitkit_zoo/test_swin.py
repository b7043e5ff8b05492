"""Swin: the outputs of timm and torchvision with the same weights, from their files; shifted windows."""

import pytest
import timm
import torch
from published import close, images, randomised, written
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

import vitkit
from vitkit.errors import UsageError
from vitkit_vit import from_windows, resize_table, shift_mask, to_windows
from vitkit_zoo.swin import PRESETS, Swin

SIZES = {"patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 4]}


def ours(size=32, window=4, **arguments):
    return Swin(**{"img_size": size, "window": window, **SIZES, **arguments}).eval()


def timm_model(size, window=4, **arguments):
    sizes = {**SIZES, "img_size": size, "window_size": window, "num_classes": 5, **arguments}
    return randomised(timm.models.SwinTransformer(**sizes))


def torchvision_model(window=4):
    sizes = {**SIZES, "patch_size": [2, 2], "window_size": [window, window]}
    return randomised(TorchvisionSwin(num_classes=5, **sizes))


@pytest.mark.parametrize(("size", "window"), [(32, 4), (64, 4), ((16, 48), 4), (32, 8), (24, 12)], ids=str)
def test_timms_weights_give_timms_tokens_and_features(tmp_path, size, window):
    """Also where the map is smaller than the window."""
    reference, backbone = timm_model(size, window), ours(size, window)
    report = vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    assert (report.missing, report.changed) == ([], [])
    assert {line.split()[0] for line in report.unused} == {"head.fc.weight", "head.fc.bias"}
    x = images(2, 3, *backbone.img_size)
    features = reference.forward_features(x)
    close(backbone(x), features.flatten(1, 2))
    close(backbone.encode_image(x), reference.forward_head(features, pre_logits=True))
    first, last = backbone.forward_features(x, [1, 2])
    close(first, reference.forward_intermediates(x)[1][0].flatten(2).mT)
    assert torch.equal(last, backbone(x))


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (28, 44), (25, 30)], ids=str)
def test_torchvisions_weights_give_torchvisions_features(tmp_path, size):
    """Also where windows or merging do not divide the map."""
    reference, backbone = torchvision_model(), ours(size)
    report = vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    assert (report.missing, report.changed) == ([], [])
    assert {line.split()[0].rpartition(".")[2] for line in report.unused} == {"relative_position_index", "weight", "bias"}
    x = images(2, 3, *size)
    tokens = reference.norm(reference.features(x))
    close(backbone(x), tokens.flatten(1, 2))
    close(backbone.encode_image(x), tokens.mean((1, 2)))
    assert tuple(tokens.shape[1:3]) == backbone.grid_size


def test_a_model_takes_other_sizes_than_its_own(tmp_path):
    reference, backbone, x = torchvision_model(), ours(32), images(1, 3, 48, 28)
    vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    close(backbone(x), reference.norm(reference.features(x)).flatten(1, 2))


def test_the_authors_names_are_read(tmp_path):
    """They merge patches at the end of a stage."""
    reference, backbone = timm_model(32), ours()
    state = {name.replace("layers.1.downsample", "layers.0.downsample"): value for name, value in reference.state_dict().items()}
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    torch.save({"model": state}, tmp_path / "w.pth")
    report = vitkit.load_weights(backbone, tmp_path / "w.pth")
    assert report.missing == []
    assert "layers.0.blocks.1.attn_mask (16, 16, 16): the backbone has none" in report.unused
    close(backbone(images(1, 3, 32, 32)), reference.forward_features(images(1, 3, 32, 32)).flatten(1, 2))


def test_tables_of_larger_windows_are_cut_and_of_smaller_ones_enlarged(tmp_path):
    reference = timm_model(64, 8)
    backbone = ours(64, 4)
    report = vitkit.load_weights(backbone, written(tmp_path, reference.state_dict()))
    assert report.changed[0] == "layers.0.blocks.0.attn.relative_position_bias_table (225, 2) → (49, 2): resized to the window"
    large = reference.layers[0].blocks[0].attn
    small = backbone.layers[0].blocks[0].attn
    bias = large._get_rel_pos_bias()[0].view(2, 8, 8, 8, 8)[:, :4, :4, :4, :4].reshape(2, 16, 16)
    assert torch.equal(small.relative_position_bias_table[small.index].view(16, 16, 2).permute(2, 0, 1), bias)
    linear = torch.arange(-3.0, 4)[:, None] + torch.zeros(7)
    enlarged = resize_table(linear.reshape(49, 1), (4, 4), (7, 4)).view(13, 7)
    torch.testing.assert_close(enlarged[:, 3], torch.linspace(-3, 3, 13), atol=0.2, rtol=0)


def test_gradients_are_timms():
    reference, backbone = timm_model(32).double(), ours().double()
    backbone.load_state_dict({name: value for name, value in reference.state_dict().items() if not name.startswith("head")})
    x = images(2, 3, 32, 32).double()
    weights = torch.randn_like(backbone(x))
    (backbone(x) * weights).sum().backward()
    (reference.forward_features(x).flatten(1, 2) * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_timms_models_and_have_the_parameters_of_the_docstring(preset):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Swin(preset=preset, img_size=32 if "_32" in preset else 224).parameters())
    assert f"{count:,}" in str(Swin.__doc__)
    if "_32" not in preset:
        from timm.models import swin_transformer

        name = f"swin_{preset}_patch4_window7_224"
        captured = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(swin_transformer, "_create_swin_transformer", lambda variant, **kwargs: captured.update(kwargs))
            getattr(swin_transformer, name)()
        ours = {"window_size" if name == "window" else name: value for name, value in PRESETS[preset].items()}
        assert {key: captured[key] for key in ours} == ours


def test_windows_are_put_together_as_they_were():
    x = images(2, 4, 6, 3)
    windows = to_windows(x, (2, 3))
    assert windows.shape == (2, 4, 6, 3)
    assert torch.equal(windows[0, 1], x[0, :2, 3:].reshape(6, 3))
    assert torch.equal(from_windows(windows, (2, 3), (4, 6)), x)


def test_positions_of_opposite_edges_do_not_attend_to_each_other():
    mask = shift_mask((4, 4), (2, 2), (1, 1))
    assert mask.shape == (4, 4, 4)
    assert not mask[0].any()
    assert mask[3].ne(0).sum() == 12  # the last window holds the four corners of the map
    assert not shift_mask((4, 2), (2, 2), (1, 0))[0].any()


def test_a_change_reaches_neighbouring_windows_only_by_the_shifted_block():
    for depth in (1, 2):
        model = randomised(Swin(patch_size=1, window=4, embed_dim=4, depths=[depth], num_heads=[1], img_size=16))
        x = images(1, 3, 16, 16)
        changed = x.clone()
        changed[:, :, 5, 5] += 1
        with torch.no_grad():
            differing = ((model(x) - model(changed)).abs().sum(-1) > 1e-6).sum()
        assert differing == 16 if depth == 1 else differing > 16


def test_tables_are_left_out_of_weight_decay():
    blocks = ("0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1", "1.blocks.2")
    assert ours().no_weight_decay() == {f"layers.{block}.attn.relative_position_bias_table" for block in blocks}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": [3, 4]}, "num_heads=3 of stage 1 does not divide its width 8; take 2 heads or another width"),
        ({"num_heads": [2]}, "the stages do not agree in number: depths: 2, num_heads: 1"),
        ({"window": 0}, "window is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, message):
    with pytest.raises(UsageError, match=message):
        ours(**arguments)
