"""Masked autoencoders: what the encoder sees and costs, the loss against lightly and the reference, resuming."""

from typing import Any

import pytest
import torch
from lightly.models import utils as lightly
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitkit import backbones, heads, losses
from vitkit.errors import UsageError
from vitkit_ssl import MAE, MAEDecoder, MaskedReconstruction, patchify, unpatchify


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mae(mask: float = 0.75, stem: str = "patch", normalise: bool = True, **options: Any) -> MAE:
    torch.manual_seed(0)
    backbone = backbones.build(
        "vitkit:vit", **{"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "dropout": 0.0, "pool": "mean", **options}, stem=stem
    )
    decoder = heads.build("vitkit:mae_decoder", in_dim=32, out_dim=48, grid_size=[4, 4], embed_dim=16, num_heads=2)
    return MAE(backbone, decoder, losses.build("vitkit:masked_reconstruction", normalise=normalise), mask=mask)


def test_patches_are_those_of_lightly_in_another_order_of_values_and_make_the_image_again() -> None:
    images = gaussian(2, 3, 16, 16)
    ours, theirs = patchify(images, 4), lightly.patchify(images, 4)
    torch.testing.assert_close(ours.unflatten(2, (3, 16)).transpose(2, 3).flatten(2), theirs)
    assert torch.equal(unpatchify(ours, (4, 4), 4), images)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_that_of_lightly_and_of_the_reference(normalise: bool) -> None:
    prediction, target = gaussian(5, 12, 48).requires_grad_(), gaussian(5, 12, 48, seed=1) * 3 + 1
    value = MaskedReconstruction(normalise)(prediction, target)["loss"]
    truth = lightly.normalize_mean_var(target, dim=-1) if normalise else target
    torch.testing.assert_close(value, torch.nn.MSELoss()(prediction, truth))
    if normalise:  # the reference averages over the pixels of each patch, then over masked patches
        written = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1.0e-6) ** 0.5
        torch.testing.assert_close(value, ((prediction - written) ** 2).mean(dim=-1).mean())


def test_a_prediction_of_zero_costs_what_uninformed_says() -> None:
    loss, target = MaskedReconstruction(), gaussian(7, 3, 12) * 5 + 2
    assert loss.uninformed(7, pixels=12)["loss"] == 11 / 12
    assert float(loss(torch.zeros(7, 3, 12), target)["loss"]) == pytest.approx(11 / 12, rel=1e-5)
    assert mae().uninformed(8) == {"loss": 47 / 48}
    assert mae(normalise=False).uninformed(8) == {"loss": 1.0}


def test_a_patch_of_one_colour_is_finite() -> None:
    prediction = torch.zeros(1, 2, 12, requires_grad=True)
    MaskedReconstruction()(prediction, torch.ones(1, 2, 12))["loss"].backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("mask", [0.25, 0.75])
def test_no_masked_pixel_reaches_the_prediction(stem: str, mask: float) -> None:
    model, images = mae(mask, stem=stem).eval(), gaussian(3, 3, 16, 16)
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    masked = order[:, : model.num_masked]
    noise = torch.zeros(3, 16, 48).scatter(1, masked[:, :, None].expand(-1, -1, 48), gaussian(3, model.num_masked, 48))
    changed = images + unpatchify(noise, (4, 4), 4)
    (one, truth), (two, other) = model.predict(images, order), model.predict(changed, order)
    assert torch.equal(one, two)
    assert not torch.equal(truth, other)


@pytest.mark.parametrize(("mask", "masked"), [(0.01, 1), (0.25, 4), (0.75, 12), (0.999, 15)])
def test_any_share_is_masked_and_each_image_by_itself(mask: float, masked: int) -> None:
    model = mae(mask)
    features = model.forward_features({"images": gaussian(1, 3, 16, 16).expand(4, -1, -1, -1)})
    assert features["prediction"].shape == features["target"].shape == (4, masked, 48)
    if 1 < masked < 15:
        sums = features["target"].sum(dim=(1, 2))
        assert len(sums.unique()) == 4


def test_several_views_are_masked_each_by_itself() -> None:
    images = gaussian(2, 1, 3, 16, 16).expand(-1, 3, -1, -1, -1)
    assert mae().forward_features({"images": images})["target"].shape == (2, 3 * 12, 48)


def flops(model: MAE, mask: float) -> int:
    model.num_masked = round(mask * 16)
    counter = FlopCounterMode(display=False)
    order = torch.arange(16).expand(8, -1)
    with counter:
        model.backbone(gaussian(8, 3, 16, 16), keep=order[:, model.num_masked :])
    return counter.get_total_flops()


def test_the_cost_of_the_encoder_falls_with_what_is_masked() -> None:
    model = mae(depth=6)
    whole, half, quarter = (flops(model, mask) for mask in (0.0, 0.5, 0.75))
    assert half < 0.55 * whole
    assert quarter < 0.30 * whole


def test_the_decoder_takes_a_cls_token_and_registers() -> None:
    model = mae(pool="cls", registers=2)
    losses_ = model({"images": gaussian(3, 3, 16, 16)})
    losses_["loss"].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "pos_embed" not in name)


def test_the_decoder_knows_places_and_not_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    decoder = MAEDecoder(in_dim=8, out_dim=12, grid_size=(4, 4), embed_dim=16, num_heads=2).eval()
    order = torch.randperm(16)[None]
    keep, masked, tokens = order[:, :4], order[:, 4:], gaussian(1, 4, 8)
    one = decoder(tokens, keep, masked)
    torch.testing.assert_close(decoder(tokens.flip(1), keep.flip(1), masked), one)
    torch.testing.assert_close(decoder(tokens, keep, masked.flip(1)), one.flip(1))
    assert not torch.allclose(decoder(tokens, keep.flip(1), masked), one)


def test_it_learns_to_predict_masked_patches() -> None:
    images = torch.linspace(-1, 1, 16).view(1, 1, 1, 16) * torch.linspace(1, 2, 8).view(8, 1, 1, 1) + torch.zeros(8, 3, 16, 16)
    model = mae()
    optimizer, values = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model({"images": images})["loss"]
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.3 * values[0]


WRONG: dict[str, tuple[Any, str]] = {
    "all": (lambda: mae(1.0), "mask is 1.0; expected a number in (0, 1)"),
    "none": (lambda: mae(0.0), "mask is 0.0; expected a number in (0, 1)"),
    "one patch": (lambda: mae(patch_size=16), "ViT has one patch; expected a backbone of two patches or more, such as 'vit'"),
    "no grid": (
        lambda: MAE(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()),
        "Identity has no grid_size, num_patches, patch_size; expected a backbone of two patches or more",
    ),
    "shapes": (
        lambda: MaskedReconstruction()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), "predictions are (2, 3, 4) and pixels (2, 3, 5)"
    ),
    "one value": (lambda: MaskedReconstruction()(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)), "with two values a patch or more"),
    "eps": (lambda: MaskedReconstruction(eps=0.0), "eps is 0.0; expected a finite positive number"),
    "heads": (
        lambda: MAEDecoder(in_dim=8, out_dim=8, embed_dim=32, num_heads=3),
        "embed_dim is 32; expected a multiple of num_heads=3 and of 4, for position codes",
    ),
    "tokens": (
        lambda: MAEDecoder(in_dim=8, out_dim=8, embed_dim=16, num_heads=2)(torch.zeros(1, 3, 8), torch.zeros(1, 4), torch.zeros(1, 2)),
        "tokens are (1, 3, 8), keep (1, 4) and masked (1, 2); expected (b, t + k, 8), (b, k) and (b, m)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_say_what_was_expected(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)
