"""The options of attention: linear, windowed, relative biases, rotations by place."""

from typing import Any

import pytest
import timm
import torch
from published import close, images, randomised
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitkit.errors import UsageError
from vitkit_vit import ViT
from vitkit_vit.attention import Attention, Layout, linear_attention, rotate
from vitkit_vit.positions import rotary2d

SMALL: dict[str, Any] = {"img_size": (16, 32), "embed_dim": 32, "depth": 3, "num_heads": 2, "dropout": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"attention": "linear"},
    "windowed": {"attention": "windowed"},
    "windowed by 2": {"attention": "windowed", "window": 2},
    "windowed, biases": {"attention": "windowed", "relative_bias": True},
    "windowed, rotary": {"attention": "windowed", "positions": "rotary"},
    "biases": {"relative_bias": True},
    "rotary": {"positions": "rotary"},
    "rotary, biases": {"positions": "rotary", "relative_bias": True},
}
TOKENS: dict[str, dict[str, Any]] = {"CLS": {}, "CLS and registers": {"registers": 2}, "patches": {"pool": "mean"}}


def vit(**arguments: Any) -> ViT:
    torch.manual_seed(0)
    model = randomised(ViT(**{**SMALL, **arguments}))
    assert isinstance(model, ViT)
    return model


def pictures(count: int = 2) -> Tensor:
    return images(count, 3, 16, 32)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("extra", [0, 2])
def test_patches_in_another_order_keep_their_places(options: str, tokens: str, extra: int) -> None:
    """Patches in order go through the windows themselves, chosen ones through a mask."""
    model = vit(**OPTIONS[options], **TOKENS[tokens])
    extra_tokens = images(2, extra, 32, seed=3) if extra else None
    order, first = torch.randperm(32, generator=torch.Generator().manual_seed(0)), model.num_prefix_tokens
    expected = model(pictures(), extra_tokens=extra_tokens)
    actual = model(pictures(), extra_tokens=extra_tokens, keep=order.expand(2, -1))
    close(actual[:, first : first + 32], expected[:, first : first + 32][:, order])
    close(actual[:, first + 32 :], expected[:, first + 32 :]) if extra else None
    pooled = model.encode_image(pictures(), extra_tokens=extra_tokens)
    close(pooled, model.pool(expected))


@pytest.mark.parametrize("relative_bias", [False, True])
def test_windowed_attention_is_masked_full_attention_gradients_included(relative_bias: bool) -> None:
    model = vit(attention="windowed", relative_bias=relative_bias, registers=1).double()
    x, extra = pictures().double(), images(2, 1, 32, seed=3).double()
    weights = images(2, 2 + 32 + 1, 32, seed=4).double()
    actual = []
    for keep in (None, torch.arange(32).expand(2, -1)):
        model.zero_grad()
        tokens = model(x, extra_tokens=extra, keep=keep)
        (tokens * weights).sum().backward()
        actual.append([tokens.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)])
    for windows, masked in zip(*actual, strict=True):
        torch.testing.assert_close(windows, masked, rtol=1e-6, atol=1e-8)


def test_a_mask_allows_the_own_window_and_tokens_without_a_place() -> None:
    layout = Layout(1, (4, 8), torch.arange(32), 1, complete=True)
    for shift in (0, 2):
        mask = layout.window_mask(4, shift)
        assert not mask[0].any()
        assert not mask[:, 0].any()
        assert not mask[-1].any()
        for a in range(32):
            for b in range(32):
                same = all((p - shift) // 4 == (q - shift) // 4 for p, q in ((a // 8, b // 8), (a % 8, b % 8)))
                assert bool(mask[1 + a, 1 + b] == 0) == same


def test_linear_attention_is_its_definition_over_all_pairs() -> None:
    q, k, v = images(3, 2, 4, 5, 8).unbind()
    weights = torch.empty(2, 4, 5, 5)
    for i in range(5):
        for j in range(5):
            one, other = (torch.where(x > 0, x + 1, x.exp()) for x in (q[:, :, i], k[:, :, j]))
            weights[:, :, i, j] = (one * other).sum(-1)
    close(linear_attention(q, k, v), weights / weights.sum(-1, keepdim=True) @ v)
    close(linear_attention(q[:, :, :2], k, v), (weights / weights.sum(-1, keepdim=True) @ v)[:, :, :2])
    assert linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
    assert linear_attention(q - 1e3, k - 1e3, v).isfinite().all()


@pytest.mark.parametrize(("kind", "growth"), [("linear", 4.0), ("windowed", 4.0), ("softmax", 16.0)])
def test_the_products_of_attention_grow_as_they_should(kind: Any, growth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times as many tokens; the linear maps of tokens do not count."""
    monkeypatch.setattr("vitkit_vit.products.products_are_faster", lambda q, dropout: True)
    flops = []
    for side in (16, 32):
        attention, x = Attention(16, 2, 0.0, kind=kind, window=4), torch.zeros(1, side * side, 16)
        layout = Layout(0, (side, side), torch.arange(side * side), 0, complete=True)
        with FlopCounterMode(display=False) as counter:
            attention(x, layout=layout)
        flops.append(counter.get_total_flops() - side * side * 2 * 4 * 16 * 16)
    assert flops[1] / flops[0] == pytest.approx(growth, rel=0.01)


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_maps_are_the_weights_that_mix_the_values(options: str) -> None:
    model = vit(**OPTIONS[options], depth=1)
    extra = images(2, 1, 32, seed=3)
    maps = model.attention_maps(pictures(), extra_tokens=extra)
    assert maps.shape == (2, 1, 2, 34, 34)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 1, 2, 34))
    block = model.blocks[0]
    tokens = model._embed(pictures(), extra, None)
    normed = block.norm1(tokens)
    values = block.attn.qkv(normed)[..., 64:].view(2, 34, 2, 16).transpose(1, 2)
    mixed = (maps[:, 0] @ values).transpose(1, 2).flatten(2)
    close(block.attn(normed, None, model._layout(pictures(), tokens, None)), block.attn.proj(mixed))


@pytest.mark.parametrize("first", [0, 1])
def test_relative_biases_are_timms(first: int) -> None:
    theirs = randomised(timm.layers.RelPosBias((3, 5), num_heads=2, prefix_tokens=first))
    ours = Attention(8, 2, 0.0, bias_grid=(3, 5))
    table = theirs.relative_position_bias_table
    with torch.no_grad():
        ours.relative_position_bias_table[: len(table)].copy_(table)
    bias = ours._bias(Layout(first, (3, 5), torch.arange(15), 0, complete=True), None)
    torch.testing.assert_close(bias, theirs.get_bias()[0])


def test_rotated_scores_depend_on_differences_of_places_only() -> None:
    """A query and a key, moved together over the grid."""
    rotation = rotary2d((6, 7), 8)
    q, k = images(2, 1, 1, 1, 8).unbind()

    def score(query: tuple[int, int], key: tuple[int, int]) -> Tensor:
        a, b = (rotate(x, rotation[:, None, None, [r * 7 + c]]) for x, (r, c) in ((q, query), (k, key)))
        return (a * b).sum()

    for moved in ((1, 0), (0, 2), (3, 3)):
        torch.testing.assert_close(score((0, 1), (2, 3)), score((moved[0], 1 + moved[1]), (2 + moved[0], 3 + moved[1])))
    assert not torch.isclose(score((0, 1), (2, 3)), score((0, 1), (3, 3)))
    assert not torch.isclose(score((0, 1), (2, 3)), score((0, 1), (2, 2)))
    torch.testing.assert_close(rotate(q, rotation[:, None, None, [9]]).norm(), q.norm())


def test_rotations_leave_tokens_without_a_place_alone_and_are_not_saved() -> None:
    model = vit(positions="rotary", registers=1)
    tokens = model._embed(pictures(), images(2, 1, 32), None)
    layout = model._layout(pictures(), tokens, None)
    assert layout is not None
    assert layout.rotation is not None
    x = images(2, 2, 35, 16)
    turned = rotate(x, layout.rotation)
    assert torch.equal(turned[:, :, [0, 1, 34]], x[:, :, [0, 1, 34]])
    close(turned[:, :, 2], x[:, :, 2])  # the first cell's angles are 0
    assert not torch.isclose(turned[:, :, 3:34], x[:, :, 3:34]).all(-1).any()
    assert not {"rotation", "pos_embed"} & set(model.state_dict())


@pytest.mark.parametrize("options", OPTIONS)
def test_checkpointing_export_and_extra_tokens_alone(options: str) -> None:
    model, x = vit(**OPTIONS[options]), pictures()
    gradients = []
    for checkpoint in (False, True):
        model.checkpoint = checkpoint
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    assert len(gradients[0]) == len(list(model.parameters()))
    assert model.encode_image(None, extra_tokens=images(4, 2, 32)).shape == (4, 32)
    close(torch.export.export(model, (x,)).module()(x), model(x))


def test_tables_are_left_out_of_weight_decay() -> None:
    assert "blocks.2.attn.relative_position_bias_table" in vit(relative_bias=True).no_weight_decay()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "windowed", "window": 3}, r"window=3 does not divide the grid of 4×8 patches; take window=2 or 4"),
        ({"attention": "windowed", "img_size": (12, 20)}, r"window=4 does not divide the grid of 3×5 patches; take another patch_size or"),
        ({"attention": "linear", "positions": "rotary"}, "positions='rotary' changes the scores of pairs of tokens, and attention="),
        ({"attention": "linear", "relative_bias": True}, "relative_bias=True changes the scores .* take positions='sincos2d', or"),
        ({"attention": "local"}, "attention is 'local'.*expected 'softmax', 'linear', 'windowed'"),
        ({"positions": "rotary", "num_heads": 16}, "positions='rotary' needs heads of a multiple of four dimensions; given .* = 2"),
        ({"positions": "rotary", "dynamic_img_size": True}, "dynamic_img_size=True takes grids of several sizes; windows, relative"),
        ({"window": 0}, "window is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vit(**arguments)
