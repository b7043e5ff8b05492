"""What every pyramid does: maps at several depths and scales, sizes, precision."""

import pytest
import torch
from published import images

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit.testing import find
from vitkit.training import adamw, muon_adamw

NAMES = ("convnext", "mobilevit", "pvt", "swin")


def small(name, **arguments):
    """The small example of the conformance kit."""
    torch.manual_seed(0)
    (case,) = find(f"vitkit:{name}", kind="backbone")
    return backbones.build(name, **{**case.kwargs, **arguments})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [28, 32, 44, 64, (32, 48)], ids=str)
def test_presets_for_small_images_take_28_to_64_pixels(name, size):
    model = backbones.build(name, preset="tiny_32", img_size=size).eval()
    x = images(1, 3, *model.img_size)
    with torch.no_grad():
        maps = model.forward_features(x, range(1, len(model.widths) + 1))
    assert [tokens.shape[1:] for tokens in maps] == [(h * w, d) for (h, w), d in zip(model.grid_sizes, model.widths, strict=True)]
    assert model.grid_size == model.grid_sizes[-1]
    assert maps[-1].shape[1:] == (model.num_patches, model.embed_dim)
    assert model.num_patches >= 9


@pytest.mark.parametrize("name", NAMES)
def test_tokens_lie_in_row_major_order(name):
    """A change in the last corner changes the last token most."""
    model, x = small(name, img_size=32).eval(), images(1, 3, 32, 32)
    changed = x.clone()
    changed[:, :, -2:, -2:] += 1
    with torch.no_grad():
        first = model.forward_features(x, [1])[0] - model.forward_features(changed, [1])[0]
    assert first.norm(dim=-1).argmax() == first.shape[1] - 1


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_each_optimiser_lowers_the_loss(name):
    for make in (adamw, muon_adamw):
        model, x = small(name), images(8, 3, *small(name).img_size)
        target = images(8, model.embed_dim, seed=3)
        optimizer, losses = make(model, lr=3e-3), []
        for _ in range(8):
            loss = (model.encode_image(x) - target).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_do_not_fit_are_answered(name):
    model = small(name)
    with pytest.raises(UsageError, match=r"images are \(2, 1, 16, 16\), expected \(batch, 3, height, width\); build the"):
        model(torch.zeros(2, 1, 16, 16))
    with pytest.raises(UsageError, match=r"images of 1×16 pixels are too small: this .* takes \d+×\d+ or more"):
        model(torch.zeros(2, 3, 1, 16))
    stages = len(model.widths)
    with pytest.raises(UsageError, match=rf"depths \[0, 9\] lie outside 1 … {stages}, the number of stages"):
        model.forward_features(images(1, 3, 16, 16), [0, 1, 9])


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_and_export_give_the_same_tokens(name):
    model = small(name).eval()
    x = images(2, 3, *model.img_size)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_falls_from_the_last_block_to_the_pixels(name):
    model = small(name)
    layers = model.layers_in_order()
    rates = {id(p): group["lr"] for group in adamw(model, lr=1.0, layer_decay=0.5).param_groups for p in group["params"]}
    for number, layer in enumerate(layers):
        assert {rates[id(parameter)] for parameter in layer.parameters()} <= {0.5 ** (len(layers) - number)}
    covered = {id(parameter) for layer in layers for parameter in layer.parameters()}
    others = {name.split(".")[0] for name, parameter in model.named_parameters() if id(parameter) not in covered}
    assert others <= {"norm", "final_conv", "stages"}
    assert {rates[id(parameter)] for parameter in model.parameters() if id(parameter) not in covered} <= {1.0}
