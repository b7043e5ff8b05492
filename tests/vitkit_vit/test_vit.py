import json
from contextlib import nullcontext

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitkit import backbones
from vitkit.errors import UsageError
from vitkit_vit import PRESETS, ViT

SMALL = {"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "dropout": 0.0}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter far from its initial value, so that none hides behind a zero or a one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3 / max(parameter.shape[-1] ** 0.5, 1))
    return module


def vit(**kwargs: object) -> ViT:
    torch.manual_seed(0)
    return ViT(**{**SMALL, **kwargs})


@pytest.fixture(params=["batched products", "torch's attention"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute attention."""
    chosen = request.param == "batched products"
    monkeypatch.setattr("vitkit_vit.products.products_are_faster", lambda q, dropout: chosen)
    return str(request.param)


TIMM = {
    "square": ({}, {"img_size": 16, "global_pool": "token"}),
    "rectangular": (
        {"img_size": (16, 24), "in_chans": 1, "mlp_ratio": 2.0},
        {"img_size": (16, 24), "in_chans": 1, "mlp_ratio": 2.0, "global_pool": "token"},
    ),
    "mean, registers": (
        {"pool": "mean", "registers": 3},
        {"img_size": 16, "global_pool": "avg", "class_token": False, "reg_tokens": 3, "fc_norm": False},
    ),
    "deep, large patches": (
        {"img_size": 32, "patch_size": 8, "depth": 4, "num_heads": 4, "registers": 1},
        {"img_size": 32, "patch_size": 8, "depth": 4, "num_heads": 4, "reg_tokens": 1, "global_pool": "token"},
    ),
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.usefixtures("path")
def test_timm_with_the_same_weights_gives_the_same_outputs_and_gradients(name: str) -> None:
    ours, theirs = TIMM[name]
    model = randomised(vit(**ours))
    defaults = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    reference = timm.models.VisionTransformer(**{**defaults, **theirs})
    reference.load_state_dict(model.state_dict())
    height, width = model.img_size
    images = torch.randn(3, model.in_chans, height, width)

    tokens, expected = model(images), reference.forward_features(images)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_image(images), reference(images), atol=1e-5, rtol=1e-5)

    model, reference, images = model.double(), reference.double(), images.double()  # gradients without rounding
    weights = torch.randn_like(tokens, dtype=torch.double)
    (model(images) * weights).sum().backward()
    (reference.forward_features(images) * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("preset", "count"), [("small", 5_360_832), ("base", 21_338_496), ("large", 75_717_120)])
def test_parameter_counts_are_those_of_the_docstring(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = ViT(preset=preset)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert f"{count:,}" in str(ViT.__doc__)
    d, depth = PRESETS[preset]["embed_dim"], PRESETS[preset]["depth"]
    block = 12 * d * d + 9 * d + 4 * d  # products; their biases; two norms
    assert count == depth * block + 48 * d + d + d + 65 * d + 2 * d  # patches, CLS, positions, norm


def test_a_preset_yields_to_what_is_said() -> None:
    model = ViT(preset="base", depth=2)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (384, 2, 6)


def test_initial_values_follow_their_distributions() -> None:
    torch.manual_seed(0)
    model = ViT(depth=2)
    linear = model.blocks[1].mlp.fc1
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not linear.bias.any()
    convolution = model.patch_embed.proj
    assert convolution.weight.std().item() == pytest.approx((2 / 48) ** 0.5, rel=0.05)
    assert not convolution.bias.any()
    assert (model.norm.weight == 1).all()
    assert not model.norm.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_patch_embedding_is_a_convolution() -> None:
    embed = vit(img_size=(8, 12)).patch_embed
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(embed(images), embed.proj(images).flatten(2).transpose(1, 2))


def test_the_same_seed_gives_the_same_model() -> None:
    for first, second in zip(vit().parameters(), vit().parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_registry_builds_it_from_what_json_can_hold() -> None:
    kwargs = {**SMALL, "img_size": (8, 12), "pool": "mean"}
    built = backbones.build("vit", **json.loads(json.dumps(kwargs)))
    assert built.img_size == (8, 12)
    assert built(torch.randn(2, 3, 8, 12)).shape == (2, 6, built.embed_dim)
    assert built.spec.kwargs["img_size"] == [8, 12]


@pytest.mark.usefixtures("path")
def test_without_positions_patches_may_change_places() -> None:
    model = randomised(vit(positions="none", pool="mean"))
    images = torch.randn(2, 3, 16, 16)
    order = torch.randperm(16)
    keep = order.expand(2, -1)
    torch.testing.assert_close(model(images, keep=keep), model(images)[:, order])
    torch.testing.assert_close(model.encode_image(images, keep=keep), model.encode_image(images))


@pytest.mark.parametrize("positions", ["learned", "sincos1d", "sincos2d"])
def test_with_positions_the_places_of_patches_matter(positions: str) -> None:
    model = vit(positions=positions, pool="mean")
    images = torch.randn(2, 3, 16, 16)
    moved = images.flip(-1)
    assert not torch.allclose(model.encode_image(images), model.encode_image(moved), atol=1e-3)


def test_fixed_positions_are_no_parameters_and_not_saved() -> None:
    model = vit(positions="sincos2d")
    assert "pos_embed" not in model.state_dict()
    assert not model.pos_embed[:, :1].any()


def test_two_dimensional_positions_differ_for_every_cell_and_rows_share_half() -> None:
    codes = vit(img_size=(8, 16), positions="sincos2d", pool="mean").pos_embed[0].view(2, 4, 32)
    assert len(codes.view(8, 32).unique(dim=0)) == 8
    assert (codes[0, :, 16:] == codes[0, :1, 16:]).all()
    assert (codes[:, 0, :16] == codes[:1, 0, :16]).all()


def test_extra_tokens_stand_behind_the_patches_and_take_part_in_attention() -> None:
    model = randomised(vit())
    images = torch.randn(2, 3, 16, 16)
    extra = torch.randn(2, 3, 32, requires_grad=True)
    tokens = model(images, extra_tokens=extra)
    assert tokens.shape == (2, 1 + 16 + 3, 32)
    assert not torch.allclose(tokens[:, :17], model(images), atol=1e-3)
    tokens[:, 0].sum().backward()
    assert extra.grad is not None
    assert (extra.grad.abs().sum(dim=-1) > 0).all()


def test_the_mean_counts_extra_tokens_but_no_registers() -> None:
    model = vit(pool="mean", registers=2)
    tokens = model(torch.randn(2, 3, 16, 16), extra_tokens=torch.randn(2, 1, 32))
    torch.testing.assert_close(model.pool(tokens), tokens[:, 2:].mean(dim=1))
    assert tokens.shape[1] == 2 + 16 + 1


def test_one_extra_token_serves_every_sample() -> None:
    model = vit()
    images, extra = torch.randn(3, 3, 16, 16), torch.randn(1, 1, 32)
    expected = model(images, extra_tokens=extra.repeat(3, 1, 1))
    torch.testing.assert_close(model(images, extra_tokens=extra), expected)
    torch.testing.assert_close(model(images, extra_tokens=extra.expand(3, -1, -1)), expected)


@pytest.mark.parametrize("arguments", [{}, {"depth": 1}, {"registers": 2}, {"pool": "mean"}, {"checkpoint": True}], ids=str)
def test_pooled_features_are_those_of_all_tokens_pooled_gradients_included(arguments: dict[str, object], path: str) -> None:
    """The CLS token alone goes through the last block; what it says is the same."""
    model = randomised(vit(**arguments))
    images, extra = torch.randn(3, 3, 16, 16), torch.randn(3, 2, 32)
    keep = torch.arange(10).expand(3, -1)
    found = []
    for call in (model.encode_image, lambda *args, **kwargs: model.pool(model(*args, **kwargs))):
        model.zero_grad()
        features = call(images, extra_tokens=extra, keep=keep)
        features.square().sum().backward()
        found.append((features.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_pooling_one_token_spares_most_of_the_last_block(path: str) -> None:
    model, images = vit(depth=1), torch.randn(2, 3, 16, 16)
    flops = []
    for call in (model.encode_image, model):
        with FlopCounterMode(display=False) as counter:
            call(images)
        flops.append(counter.get_total_flops())
    patches = 2 * 2 * 16 * 3 * 16 * 32
    assert flops[0] - patches < 0.25 * (flops[1] - patches)


@pytest.mark.parametrize(("pool", "prefix"), [("cls", 1), ("mean", 0)])
def test_extra_tokens_alone_go_without_an_image(pool: str, prefix: int) -> None:
    model = vit(pool=pool)
    extra = torch.randn(4, 2, 32)
    assert model(None, extra_tokens=extra).shape == (4, prefix + 2, 32)
    assert model.encode_image(None, extra_tokens=extra).shape == (4, 32)


def test_keeping_every_patch_keeps_the_tokens_and_a_kept_patch_keeps_its_position() -> None:
    model = vit()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images, keep=torch.arange(16).expand(2, -1)), model(images))
    keep = torch.tensor([[3, 5], [15, 0]])
    kept = model._embed(images, None, keep)
    whole = model._embed(images, None, None)
    assert torch.equal(kept[1, 1:], whole[1, [16, 1]])
    assert model(images, keep=keep).shape == (2, 3, 32)


def test_samples_do_not_see_each_other() -> None:
    model = vit()
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))
    assert model(images[:0]).shape == (0, 17, 32)


@pytest.mark.usefixtures("path")
def test_features_at_the_last_depth_are_the_output() -> None:
    model = vit(depth=3)
    images = torch.randn(2, 3, 16, 16)
    last, first = model.forward_features(images, depths=(3, 1))
    torch.testing.assert_close(last, model(images))
    torch.testing.assert_close(first, model.norm(model.blocks[0](model._embed(images, None, None))))


@pytest.mark.usefixtures("path")
def test_attention_maps_are_the_weights_that_mix_the_values() -> None:
    model = randomised(vit(depth=1))
    images, extra = torch.randn(2, 3, 16, 16), torch.randn(2, 1, 32)
    maps = model.attention_maps(images, extra_tokens=extra)
    assert maps.shape == (2, 1, 2, 18, 18)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 1, 2, 18))
    block = model.blocks[0]
    normed = block.norm1(model._embed(images, extra, None))
    values = block.attn.qkv(normed)[..., 64:].view(2, 18, 2, 16).transpose(1, 2)
    mixed = (maps[:, 0] @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(normed))


def gradients(model: ViT, images: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    model.encode_image(images).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.usefixtures("path")
def test_checkpointing_gives_the_same_gradients(dropout: float) -> None:
    images = torch.randn(3, 3, 16, 16)
    plain = gradients(vit(dropout=dropout), images)
    recomputed = gradients(vit(dropout=dropout, checkpoint=True), images)
    for first, second in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("noise", [{"dropout": 0.5}, {"attn_dropout": 0.5}, {"drop_path": 0.5}])
@pytest.mark.usefixtures("path")
def test_noise_is_drawn_in_training_from_the_seed_and_off_in_evaluation(noise: dict[str, float]) -> None:
    model = randomised(vit(**noise))
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(5)
    first = model(images)
    assert not torch.allclose(model(images), first, atol=1e-4)
    torch.manual_seed(5)
    torch.testing.assert_close(model(images), first)
    model.eval()
    torch.testing.assert_close(model(images), randomised_twin(model)(images))


def randomised_twin(model: ViT) -> ViT:
    """The same weights without any noise, in training mode."""
    twin = vit()
    twin.load_state_dict(model.state_dict())
    return twin


def test_stochastic_depth_skips_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = vit(depth=2, drop_path=0.25).blocks[1]
    branch = block._skip(torch.ones(4000, 3, 2))
    assert ((branch == 0) | (branch == 1 / 0.75)).all()
    assert (branch == branch[:, :1, :1]).all()
    assert branch.mean().item() == pytest.approx(1.0, abs=0.05)
    assert vit(depth=5, drop_path=0.4).blocks[2].drop_path == pytest.approx(0.2)


def test_autocast_changes_the_outputs_by_no_more_than_its_precision() -> None:
    model = vit(depth=4)
    images = torch.randn(4, 3, 16, 16)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()


WRONG = {
    "heads": (
        {"embed_dim": 32, "num_heads": 3},
        "num_heads=3 does not divide embed_dim=32; take num_heads=2 or embed_dim=33",
    ),
    "patches": (
        {"img_size": 28, "patch_size": 8},
        "patch_size=8 does not divide an image of 28×28 pixels; take img_size=(32, 32) or another patch_size",
    ),
    "size": ({"img_size": [4, 4, 4]}, "img_size is [4, 4, 4], expected a number of pixels or (height, width)"),
    "depth": ({"depth": 0}, "depth is 0; expected at least 1"),
    "registers": ({"registers": -1}, "registers is -1; expected at least 0"),
    "dropout": ({"dropout": 1.0}, "dropout is 1.0; expected a number in [0, 1)"),
    "drop_path": ({"drop_path": -0.1}, "drop_path is -0.1; expected a number in [0, 1)"),
    "pool": ({"pool": "max"}, "pool is 'max'; expected 'cls', 'mean'"),
    "positions": ({"positions": "rope"}, "expected 'learned', 'sincos1d', 'sincos2d', 'rotary', 'none'"),
    "preset": ({"preset": "huge"}, "preset is 'huge'; expected 'small', 'base', 'large'"),
    "mlp": ({"mlp_ratio": 0.01}, "mlp_ratio=0.01 leaves the MLP of embed_dim=32 no hidden channel"),
    "sincos1d": ({"embed_dim": 33, "num_heads": 3, "positions": "sincos1d"}, "needs an even embed_dim"),
    "sincos2d": ({"embed_dim": 34, "positions": "sincos2d"}, "needs an embed_dim that four divides; given 34"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_answered(name: str) -> None:
    kwargs, message = WRONG[name]
    with pytest.raises(UsageError) as caught:
        vit(**kwargs)
    assert message in str(caught.value)


IMAGES = torch.zeros(2, 3, 16, 16)
MISUSED = {
    "channels": (
        lambda model: model(torch.zeros(2, 1, 16, 16)),
        "images are (2, 1, 16, 16), expected (batch, 3, 16, 16); resize them, or build the ViT with their",
    ),
    "no batch": (lambda model: model(IMAGES[0]), "images are (3, 16, 16), expected (batch, 3, 16, 16)"),
    "nothing": (lambda model: model(None), "neither an image nor an extra token: give x, extra_tokens or both"),
    "extra shape": (
        lambda model: model(IMAGES, extra_tokens=torch.zeros(2, 32)),
        "extra_tokens are (2, 32), expected (batch, tokens, 32); vectors (batch, 32) become one token a sample by",
    ),
    "extra batch": (
        lambda model: model(IMAGES, extra_tokens=torch.zeros(3, 1, 32)),
        "3 samples of extra_tokens for 2 images; give as many, or one for all",
    ),
    "keep": (
        lambda model: model(IMAGES, keep=torch.zeros(2)),
        "keep is torch.float32 (2,), expected int64 (2, patches to keep of an image)",
    ),
    "keep of nothing": (
        lambda model: model(None, extra_tokens=torch.zeros(2, 1, 32), keep=torch.zeros(2, 1, dtype=torch.int64)),
        "keep names patches, but there is no image",
    ),
    "depths": (
        lambda model: model.forward_features(IMAGES, depths=(0, 1, 3)),
        "depths [0, 3] lie outside 1 … 2, the number of blocks",
    ),
}


@pytest.mark.parametrize("name", MISUSED)
def test_calls_that_do_not_fit_are_answered(name: str) -> None:
    call, message = MISUSED[name]
    with pytest.raises(UsageError) as caught:
        call(vit())
    assert message in str(caught.value)


def test_nothing_is_computed_twice_for_gradients_that_nobody_wants() -> None:
    model = vit()
    for context in (torch.no_grad(), torch.inference_mode(), nullcontext()):
        with context:
            assert torch.isfinite(model(torch.randn(2, 3, 16, 16))).all()


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "none"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_a_vit_takes_images_of_other_sizes_where_asked(positions: str, stem: str) -> None:
    fixed, dynamic = (vit(positions=positions, stem=stem, dynamic_img_size=flag).eval() for flag in (False, True))
    torch.testing.assert_close(dynamic(IMAGES), fixed(IMAGES))
    assert dynamic(IMAGES[:, :, :8, :12]).shape == (len(IMAGES), 1 + 6, 32)


def test_positions_are_interpolated_as_timm_does() -> None:
    model = randomised(vit(pool="mean", dynamic_img_size=True)).eval()
    reference = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool="avg", class_token=False,
        fc_norm=False, dynamic_img_size=True,
    ).eval()  # fmt: skip
    reference.load_state_dict(model.state_dict())
    small = IMAGES[:, :, :8, :8]
    torch.testing.assert_close(model.encode_image(small), reference(small), rtol=1e-4, atol=1e-5)


def test_a_size_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected \(batch, 3, sides that patch_size=4 divides\)"):
        vit(dynamic_img_size=True)(IMAGES[:, :, :10, :8])
