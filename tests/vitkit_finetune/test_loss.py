"""Cross-entropy with smoothed and mixed labels: its formula, torch's and timm's values, and what it does without labels."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from vitkit import losses
from vitkit.contracts import UNLABELLED
from vitkit.errors import UsageError


def drawn(samples=12, classes=5):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(samples, classes, generator=generator), torch.randint(0, classes, (samples,), generator=generator),
        torch.randint(0, classes, (samples,), generator=generator), torch.rand(samples, generator=generator),
    )  # fmt: skip


def test_plain_it_is_torchs_and_smoothed_it_is_timms():
    logits, labels, *_ = drawn()
    torch.testing.assert_close(losses.build("cross_entropy")(logits, labels)["loss"], F.cross_entropy(logits, labels))
    smoothed = losses.build("cross_entropy", smoothing=0.1)(logits, labels)["loss"]
    torch.testing.assert_close(smoothed, LabelSmoothingCrossEntropy(0.1)(logits, labels))


def test_mixed_it_is_that_of_the_mixed_targets():
    logits, labels, partners, weights = drawn()
    targets = weights[:, None] * F.one_hot(labels, 5) + (1 - weights)[:, None] * F.one_hot(partners, 5)
    targets = 0.9 * targets + 0.1 / 5
    found = losses.build("cross_entropy", smoothing=0.1)(logits, labels, partners, weights)
    torch.testing.assert_close(found["loss"], SoftTargetCrossEntropy()(logits, targets))
    main = torch.where(weights >= 0.5, labels, partners)
    assert float(found["top1"]) == pytest.approx(float((logits.argmax(1) == main).float().mean()))


def test_even_logits_lose_the_logarithm_of_the_number_of_classes():
    _, labels, partners, weights = drawn()
    for smoothing in (0.0, 0.3):
        found = losses.build("cross_entropy", smoothing=smoothing)(torch.zeros(12, 5), labels, partners, weights)
        assert float(found["loss"]) == pytest.approx(math.log(5))


def test_samples_without_a_label_do_not_count():
    logits, labels, *_ = drawn()
    masked = labels.clone()
    masked[4:] = UNLABELLED
    found = losses.build("cross_entropy", smoothing=0.1)(logits.requires_grad_(), masked)
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits[:4], labels[:4], label_smoothing=0.1))
    found["loss"].backward()
    assert not logits.grad[4:].any()
    empty = losses.build("cross_entropy")(logits.detach(), torch.full_like(labels, UNLABELLED))
    assert (float(empty["loss"]), float(empty["top1"])) == (0.0, 0.0)


def test_wrong_inputs_are_refused():
    logits, labels, partners, _ = drawn()
    with pytest.raises(UsageError, match=r"smoothing is 1.0; expected a number in \[0, 1\)"):
        losses.build("cross_entropy", smoothing=1.0)
    with pytest.raises(UsageError, match=r"logits are \(12, 5\) and labels \(3,\); expected \(b, k\) and \(b,\)"):
        losses.build("cross_entropy")(logits, labels[:3])
    with pytest.raises(UsageError, match="partners and weights belong together; give both, or none"):
        losses.build("cross_entropy")(logits, labels, partners)
