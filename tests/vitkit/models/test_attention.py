"""Attention maps: those of the forward pass, whatever computes it, beside which its output does not change."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit.models import attention, principal_colours, rolled_out

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
SWIN = {"depths": [1, 1], "embed_dim": 24, "num_heads": [1, 2]}


def images(count=2, size=32, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def spread(module):
    """Larger weights, so that attention is far from even."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return module.eval()


def vit(**arguments):
    torch.manual_seed(0)
    return spread(backbones.build("vit", **SMALL | arguments))


def timm(name="test_vit", **arguments):
    torch.manual_seed(0)
    return spread(backbones.build(f"timm/{name}", img_size=32, **arguments))


@pytest.mark.parametrize("arguments", [{}, {"registers": 3}, {"pool": "mean"}, {"pool": "mean", "registers": 2}])
def test_maps_of_the_vit_are_the_ones_that_it_computes_itself(arguments):
    backbone = vit(**arguments)
    found = attention(backbone, images())
    expected = backbone.attention_maps(images())
    torch.testing.assert_close(found.heads, expected[:, -1])
    torch.testing.assert_close(found.heads.sum(-1), torch.ones(found.heads.shape[:-1]))
    assert (found.grid, found.prefix, found.has_cls) == ((4, 4), backbone.num_prefix_tokens, backbone.cls_token is not None)
    rows = expected[:, -1][..., :1, :] if found.has_cls else expected[:, -1][..., found.prefix :, :]
    torch.testing.assert_close(found.head_maps(), rows[..., found.prefix :].mean(-2).unflatten(-1, (4, 4)))
    assert found.patches().shape == (2, 16, 32)


def test_rollout_is_the_product_over_blocks_and_its_rows_sum_to_one():
    backbone = vit()
    found = attention(backbone, images())
    expected = torch.eye(17)
    for block in backbone.attention_maps(images()).mean(dim=2).unbind(1):
        expected = (block + torch.eye(17)) / 2 @ expected
    torch.testing.assert_close(found.rollout, expected)
    torch.testing.assert_close(found.rollout.sum(-1), torch.ones(2, 17))
    torch.testing.assert_close(found.rollout_map(), expected[:, 0, 1:].unflatten(1, (4, 4)))


def test_rollout_in_closed_form():
    even = torch.full((1, 4, 5, 5), 0.2)
    one = rolled_out(None, even)
    torch.testing.assert_close(one[0], torch.full((5, 5), 0.1) + torch.eye(5) / 2)
    # With A = J/5 and A² = A, ((A + I)/2)ⁿ = A·(1 − 2⁻ⁿ) + I·2⁻ⁿ.
    torch.testing.assert_close(rolled_out(rolled_out(one, even), even)[0], torch.full((5, 5), 0.2 * 7 / 8) + torch.eye(5) / 8)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "test_vit4", "beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_timms_attention_is_the_same_with_fused_operations_and_without(name):
    backbone = timm(name, **({} if name.startswith("test") else {"depth": 2}))
    with torch.no_grad():  # torch may choose another operation where there are gradients
        before = backbone(images(1))
        fused = attention(backbone, images(1))
        assert torch.equal(fused.tokens, before)
        assert torch.equal(backbone(images(1)), before)
    changed = [module for module in backbone.modules() if getattr(module, "fused_attn", False)]
    for module in changed:
        module.fused_attn = False
    plain = attention(backbone, images(1))
    assert changed
    torch.testing.assert_close(fused.heads, plain.heads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fused.rollout, plain.rollout, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fused.heads.sum(-1), torch.ones(fused.heads.shape[:-1]))


def test_timms_maps_are_the_softmax_of_its_queries_and_keys():
    backbone = timm()
    kept = []
    last = backbone.model.blocks[-1].attn
    last.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].clone()))
    found = attention(backbone, images(1))
    with torch.no_grad():
        backbone(images(1))
    q, k, _ = last.qkv(kept[1]).unflatten(2, (3, last.num_heads, last.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = last.q_norm(q), last.k_norm(k)
    torch.testing.assert_close(found.heads, torch.softmax(q @ k.mT * last.scale, dim=-1))
    assert found.has_cls == (backbone.model.cls_token is not None)


def test_tokens_are_those_of_a_forward_pass_in_evaluation_mode_and_modes_stay():
    backbone = vit(dropout=0.5).train()
    state = torch.get_rng_state()
    found = attention(backbone, images())
    assert backbone.training
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        assert torch.equal(found.tokens, backbone.eval()(images()))
    assert not found.tokens.requires_grad


def test_under_autocast_maps_are_close_and_in_fp32():
    backbone = vit()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(backbone, images())
    assert found.heads.dtype == found.rollout.dtype == torch.float32
    torch.testing.assert_close(found.heads, backbone.attention_maps(images())[:, -1], atol=0.15, rtol=0.1)


def test_an_image_that_is_no_square_has_its_own_grid():
    backbone = vit(img_size=(16, 48))
    assert attention(backbone, torch.randn(1, 3, 16, 48)).grid == (2, 6)


def test_windows_and_convolutions_have_colours_but_no_maps():
    torch.manual_seed(0)
    windows = backbones.build("timm/swin_tiny_patch4_window7_224", img_size=64, window_size=2, **SWIN)
    found = attention(windows, torch.randn(1, 3, 64, 64))
    text = (
        r"the last block of TimmBackbone attends within windows: its weights are \(16, 2, 4, 4\), those between all tokens would be "
        r"\(1, heads, 64, 64\); so there are no attention maps"
    )
    with pytest.raises(UsageError, match=text):
        found.head_maps()
    with pytest.raises(UsageError, match="attends within windows"):
        found.rollout_map()
    assert principal_colours(found.patches()).shape == (1, 64, 3)
    convolutions = attention(backbones.build("timm/test_resnet"), torch.randn(1, 3, 64, 64))
    assert convolutions.grid == (2, 2)
    with pytest.raises(UsageError, match="TimmBackbone computes no attention between tokens, so there are no attention maps"):
        convolutions.head_maps()


def test_one_window_in_the_last_block_has_maps_but_no_rollout():
    torch.manual_seed(0)
    windows = backbones.build("timm/swin_tiny_patch4_window7_224", img_size=32, window_size=4, **SWIN)
    found = attention(windows, torch.randn(1, 3, 32, 32))
    assert found.head_maps().shape == (1, 2, 4, 4)
    with pytest.raises(UsageError, match="attention rollout needs attention between all tokens in every block"):
        found.rollout_map()


class Tokens(nn.Module):
    """A backbone that gives what it was made with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def test_other_outputs_are_refused():
    with pytest.raises(UsageError, match=r"Tokens gave \(1, 5\) for 1 images; expected tokens \(b, n, d\)"):
        attention(Tokens(torch.zeros(1, 5)), images(1))
    with pytest.raises(UsageError, match="Tokens gives 7 tokens, 0 of them CLS and registers; the others make no grid"):
        attention(Tokens(torch.zeros(1, 7, 4)), images(1))


def test_torchs_own_encoder_layers_have_maps():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.patch, self.layers = nn.Conv2d(3, 16, 8, 8), nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.layers(self.patch(x).flatten(2).mT)

    torch.manual_seed(0)
    backbone = spread(Encoder())
    found = attention(backbone, images())
    with torch.no_grad():
        torch.testing.assert_close(found.tokens, backbone(images()), atol=1e-5, rtol=1e-5)
        between = backbone.layers.layers[0](backbone.patch(images()).flatten(2).mT)
        _, expected = backbone.layers.layers[1].self_attn(between, between, between, average_attn_weights=False)
    torch.testing.assert_close(found.heads, expected, atol=1e-5, rtol=1e-5)
    assert found.rollout_map().shape == (2, 4, 4)


def test_tokens_that_do_not_lie_in_rows_are_not_drawn():
    pairs = backbones.build("pair_vit", img_size=16, stem=[8, 16, 16], depth=2, num_heads=2, mlp_dim=32)
    with pytest.raises(UsageError, match="the patch tokens of PairViT are not in row-major order, so they cannot be drawn over an image"):
        attention(pairs, torch.randn(1, 3, 16, 32))


def test_attention_to_fewer_keys_has_no_maps():
    pyramid = backbones.build("timm/pvt_v2_b0", img_size=64)
    found = attention(pyramid, torch.randn(1, 3, 64, 64))
    assert found.rollout is None
    with pytest.raises(UsageError, match="attention rollout needs attention between all tokens in every block"):
        found.rollout_map()


def test_masks_scales_and_grouped_keys_are_those_of_torchs_operation():
    class Masked(nn.Module):
        def forward(self, x):
            q, k, v = x.new_ones(1, 4, 4, 8).cumsum(2), x.new_ones(1, 2, 4, 8), torch.eye(4).expand(1, 2, 4, 4)
            self.expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
            return x.new_zeros(1, 4, 8)

    backbone = Masked()
    found = attention(backbone, images(1))
    torch.testing.assert_close(found.heads, backbone.expected)  # the values are the identity


def test_principal_colours_are_the_components_with_one_sign():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    axes = torch.linalg.qr(torch.randn(6, 3, generator=generator)).Q  # (6 3)
    tokens = (scores @ axes.T + 5).unflatten(0, (4, 50))
    colours = principal_colours(tokens)
    assert colours.shape == (4, 50, 3)
    assert float(colours.min()) >= 0
    assert float(colours.max()) <= 1
    first = torch.corrcoef(torch.stack([colours.flatten(0, 1)[:, 0], scores[:, 0]]))[0, 1]
    assert abs(float(first)) > 0.98
    assert torch.equal(principal_colours(tokens), colours)
    # With the opposite sign of all tokens each colour runs the other way, since the sign of an axis is fixed.
    torch.testing.assert_close(principal_colours(-tokens), 1 - colours, atol=1e-4, rtol=0)


def test_components_without_variance_are_grey():
    line = torch.linspace(0, 1, 60)[:, None] * torch.ones(4)
    colours = principal_colours(line)
    assert torch.equal(colours[:, 1:], torch.full((60, 2), 0.5))
    assert float(colours[0, 0]) == 0
    assert float(colours[-1, 0]) == 1
    assert torch.equal(principal_colours(torch.ones(9, 2)), torch.full((9, 3), 0.5))
    with pytest.raises(UsageError, match="principal components need at least two tokens; given 1"):
        principal_colours(torch.ones(1, 4))
