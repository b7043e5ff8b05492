"""CCT: the published structure, written down a second time by functions; its parameters; what it shares with `vit`."""

import pytest
import torch
import torch.nn.functional as F
from published import close, images, randomised, written

import vitkit
from vitkit.errors import UsageError
from vitkit_zoo.cct import CCT, PRESETS, sines

SMALL = {"img_size": 16, "embed_dim": 16, "num_heads": 2, "dropout": 0.0, "attn_dropout": 0.0, "drop_path": 0.0}


def cct(**arguments):
    return randomised(CCT(**{"preset": "2_3x2", **SMALL, **arguments}))


def published(model):
    """The state dict under the published names."""
    names = {".norm2.": ".norm1.", ".norm1.": ".pre_norm.", ".attn.": ".self_attn.", ".mlp.fc1.": ".linear1.", ".mlp.fc2.": ".linear2."}
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("tokenizer."):
            number = name.split(".")[2]
            state[f"tokenizer.conv_layers.{number}.0.weight"] = value
            continue
        part = next((part for part in names if part in name), None)
        state["classifier." + (name.replace(part, names[part]) if part else name)] = value
    return state | {"classifier.fc.weight": torch.randn(5, model.embed_dim), "classifier.fc.bias": torch.randn(5)}


def features_by_the_paper(state, x, heads, kernel):
    """The pooled features `(b d)` in front of the classifier, from a state dict of published names."""
    stride, padding = max(1, kernel // 2 - 1), max(1, kernel // 2)
    for number in range(2):
        weight = state.get(f"tokenizer.conv_layers.{number}.0.weight")
        if weight is not None:
            x = F.max_pool2d(F.conv2d(x, weight, stride=stride, padding=padding).clamp(min=0), 3, 2, 1)
    x = torch.einsum("bdhw->bhwd", x).flatten(1, 2) + state["classifier.positional_emb"]
    width = x.shape[-1]

    def normed(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    block = 0
    while f"classifier.blocks.{block}.linear1.weight" in state:
        inner = {name.removeprefix(f"classifier.blocks.{block}."): value for name, value in state.items()}
        name = f"classifier.blocks.{block}"
        q, k, v = (normed(x, f"{name}.pre_norm") @ inner["self_attn.qkv.weight"].T).split(width, dim=-1)
        mixed = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) / (width // heads) ** 0.5
            mixed.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[..., part])
        x = x + torch.cat(mixed, dim=-1) @ inner["self_attn.proj.weight"].T + inner["self_attn.proj.bias"]
        x = normed(x, f"{name}.norm1")  # the residual of the MLP is the normed sum
        x = x + F.gelu(x @ inner["linear1.weight"].T + inner["linear1.bias"]) @ inner["linear2.weight"].T + inner["linear2.bias"]
        block += 1
    x = normed(x, "classifier.norm")
    scores = (x * state["classifier.attention_pool.weight"]).sum(-1) + state["classifier.attention_pool.bias"]
    return torch.einsum("bn,bnd->bd", scores.softmax(dim=1), x)


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize(("preset", "kernel"), [("2_3x2", 3), ("6_3x1", 3), ("7_7x2", 7)])
def test_published_weights_give_the_features_of_the_paper(tmp_path, preset, kernel, size):
    first = cct(preset=preset, img_size=size, num_heads=4)
    state, second = published(first), CCT(**{**SMALL, "preset": preset, "img_size": size, "num_heads": 4}).eval()
    report = vitkit.load_weights(second, written(tmp_path, state))
    assert (report.missing, report.changed) == ([], [])
    assert {line.split()[0] for line in report.unused} == {"classifier.fc.weight", "classifier.fc.bias"}
    x = images(2, 3, size, size)
    close(second.encode_image(x), features_by_the_paper(state, x, 4, kernel))


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_docstring(preset):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CCT(preset=preset, img_size=224 if "7x2" in preset else 32).parameters())
    assert f"{count:,}" in str(CCT.__doc__)


@pytest.mark.parametrize(("preset", "millions"), [("2_3x2", 0.28), ("7_3x1", 3.76)])
def test_parameters_with_ten_classes_are_the_published_number(preset, millions):
    model = CCT(preset=preset)
    count = sum(parameter.numel() for parameter in model.parameters()) + 10 * (model.embed_dim + 1)
    assert round(count / 1e6, 2) == millions


def test_positions_of_another_grid_are_resampled(tmp_path):
    first, second = cct(img_size=32), cct(img_size=16)
    report = vitkit.load_weights(second, written(tmp_path, first.state_dict()))
    assert report.changed == ["positional_emb (1, 64, 16) → (1, 16, 16): resampled"]


def test_sines_alternate_with_cosines():
    codes = sines(5, 6)
    for position in range(5):
        for i in range(3):
            angle = torch.tensor(position / 10000 ** (2 * i / 6))
            torch.testing.assert_close(codes[position, 2 * i : 2 * i + 2], torch.stack([angle.sin(), angle.cos()]))
    assert "positional_emb" not in cct(positions="sine").state_dict()


def test_extra_tokens_stand_behind_the_patches_take_part_in_attention_and_are_pooled():
    model, x = cct(), images(2, 3, 16, 16)
    extra = images(2, 3, 16, seed=4).requires_grad_()
    tokens = model(x, extra_tokens=extra)
    assert tokens.shape == (2, 16 + 3, 16)
    assert not torch.allclose(tokens[:, :16], model(x), atol=1e-3)
    model.encode_image(x, extra_tokens=extra)[:, 0].sum().backward()
    assert (extra.grad.abs().sum(dim=-1) > 0).all()
    assert model.encode_image(None, extra_tokens=extra).shape == (2, 16)
    with pytest.raises(UsageError, match="neither an image nor an extra token"):
        model(None)


def test_kept_tokens_keep_their_positions():
    model, x = cct(), images(2, 3, 16, 16)
    close(model(x, keep=torch.arange(16).expand(2, -1)), model(x))
    keep = torch.tensor([[3, 5], [15, 0]])
    embedded = model._embed(x, None, None)
    assert torch.equal(model._embed(x, None, keep)[1], embedded[1, [15, 0]])
    with pytest.raises(UsageError, match=r"keep is torch.float32 \(2,\), expected int64 \(2, patches to keep of an image\)"):
        model(x, keep=torch.zeros(2))


def test_features_at_the_last_depth_are_the_output_and_maps_mix_the_values():
    model, x = cct(preset="4_3x2"), images(2, 3, 16, 16)
    first, last = model.forward_features(x, [1, 4])
    assert torch.equal(last, model(x))
    assert first.shape == last.shape
    maps = model.attention_maps(x)
    assert maps.shape == (2, 4, 2, 16, 16)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 2, 16))
    with pytest.raises(UsageError, match=r"depths \[0, 5\] lie outside 1 … 4, the number of blocks"):
        model.forward_features(x, [0, 5])


@pytest.mark.parametrize("noise", [{"dropout": 0.5}, {"attn_dropout": 0.5}, {"drop_path": 0.5}])
def test_noise_is_drawn_in_training_only(noise):
    model, x = cct(**noise).train(), images(4, 3, 16, 16)
    assert not torch.allclose(model(x), model(x), atol=1e-4)
    plain = cct()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), plain(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 of stage 1 does not divide its width 16; take 2 heads"),
        ({"positions": "sincos"}, "positions is 'sincos'.*expected 'learned', 'sine', 'none'"),
        ({"kernel": 0}, "kernel is 0; expected at least 1"),
        ({"preset": "3_3x1"}, "preset is '3_3x1'"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, message):
    with pytest.raises(UsageError, match=message):
        cct(**arguments)


def test_images_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"images are \(1, 3, 8, 8\), expected \(batch, 3, 16, 16\); resize them, or build the CCT"):
        cct()(torch.zeros(1, 3, 8, 8))
