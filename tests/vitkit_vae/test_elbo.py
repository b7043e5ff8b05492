from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from vitkit import losses
from vitkit.errors import UsageError
from vitkit_vae import KLLoss, ReconstructionLoss


def test_kl_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    mu, log_var = torch.randn(6, 5), 2 * torch.randn(6, 5)
    expected = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(KLLoss()(mu, log_var)["loss"], expected.sum(1).mean())
    torch.testing.assert_close(KLLoss("dimension")(mu, log_var)["loss"], expected.mean())


def test_kl_by_hand() -> None:
    assert KLLoss()(torch.zeros(3, 4), torch.zeros(3, 4))["loss"] == 0
    torch.testing.assert_close(KLLoss()(torch.full((3, 4), 2.0), torch.zeros(3, 4))["loss"], torch.tensor(8.0))
    narrow = KLLoss()(torch.zeros(1, 1), torch.tensor([[-2.0]]))["loss"]
    torch.testing.assert_close(narrow, torch.tensor(0.5 * (2 - 1) + 0.5 * 2.718281828**-2))


def test_bce_is_the_negative_log_likelihood_of_torch_distributions() -> None:
    torch.manual_seed(0)
    logits, images = torch.randn(4, 2, 3, 3), torch.rand(4, 2, 3, 3).round()
    expected = -Bernoulli(logits=logits).log_prob(images)
    torch.testing.assert_close(ReconstructionLoss("bce", "image")(logits, images)["loss"], expected.sum((1, 2, 3)).mean())
    torch.testing.assert_close(ReconstructionLoss("bce")(logits, images)["loss"], expected.mean())


def test_mse_and_l1_by_hand_and_their_reductions() -> None:
    logits, images = torch.zeros(4, 1, 2, 3), torch.ones(4, 1, 2, 3)  # reconstructions are ½
    images[0] = 0.5
    for kind, pixel in (("mse", 0.25), ("l1", 0.5)):
        torch.testing.assert_close(ReconstructionLoss(kind)(logits, images)["loss"], torch.tensor(pixel * 3 / 4))
        torch.testing.assert_close(ReconstructionLoss(kind, "image")(logits, images)["loss"], torch.tensor(pixel * 6 * 3 / 4))


@pytest.mark.parametrize("kind", ["mse", "l1", "bce"])
def test_a_perfect_reconstruction_costs_nothing_but_its_entropy(kind: Any) -> None:
    images = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)
    assert ReconstructionLoss(kind)(1e4 * (images - 0.5), images)["loss"] < 1e-6


def test_extreme_logits_and_latents_stay_finite_under_autocast() -> None:
    images = torch.rand(2, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for kind in ("mse", "l1", "bce"):
            logits = torch.full((2, 1, 4, 4), 1e4, dtype=torch.bfloat16, requires_grad=True)
            loss = losses.build("reconstruction", kind=kind)(logits, images)["loss"]
            loss.backward()
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert logits.grad is not None
            assert logits.grad.isfinite().all()
        assert losses.build("kl")(torch.full((2, 3), 1e6), torch.full((2, 3), 10.0))["loss"].isfinite()


def test_a_posterior_that_ignores_the_image_costs_its_uninformed_value() -> None:
    for reduction in ("image", "dimension"):
        loss: Any = losses.build("kl", reduction=reduction)
        assert loss.uninformed(4)["loss"] == float(loss(torch.zeros(4, 3), torch.zeros(4, 3))["loss"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReconstructionLoss("l2"), "kind is 'l2'; expected 'mse', 'bce', 'l1'"),
        (lambda: ReconstructionLoss(reduction="sum"), "reduction is 'sum'; expected 'pixel', 'image'"),
        (lambda: KLLoss("sum"), "reduction is 'sum'; expected 'image', 'dimension'"),
        (lambda: KLLoss()(torch.zeros(2, 3), torch.zeros(2, 4)), r"μ is \(2, 3\) and log σ² \(2, 4\); expected one shape"),
        (
            lambda: ReconstructionLoss()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 5, 5)),
            r"reconstructions are \(2, 1, 4, 4\), images \(2, 1, 5, 5\); expected one shape",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
