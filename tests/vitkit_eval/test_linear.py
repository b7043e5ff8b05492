"""The linear probe is scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vitkit import evaluators
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit_eval import LinearProbe, fit_logistic
from vitkit_eval.linear import moments


def blobs(n, d, k, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=torch.Generator().manual_seed(99)) * spread
    labels = torch.arange(n) % k
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def objective(features, labels, weight, bias, C):
    logits = features.double() @ weight.double().T + bias.double()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return float(loss + weight.double().square().sum() / (2 * C))


@pytest.mark.parametrize("C", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probe_minimises_what_scikit_learn_minimises(C, dtype):
    features, labels = blobs(300, 8, 4)
    fit = fit_logistic(features.to(dtype), labels, 4, C=C, max_iter=500)
    assert fit.converged
    weight, bias = fit.weight, fit.bias
    reference = LogisticRegression(C=C, max_iter=5000, tol=1e-10).fit(features.double().numpy(), labels.numpy())
    theirs = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
    lowest = objective(features, labels, *theirs, C)
    assert objective(features, labels, weight, bias, C) == pytest.approx(lowest, rel=1e-5)
    # A gradient of at most 1e-5 bounds the distance to the minimum by 1e-5 over the least curvature, 1/(C·n).
    near = max(2e-3, 1e-5 * C * len(features))
    torch.testing.assert_close(weight.double(), theirs[0], atol=near, rtol=2e-3)
    torch.testing.assert_close((bias - bias.mean()).double(), theirs[1] - theirs[1].mean(), atol=near, rtol=0)
    test, _ = blobs(500, 8, 4, seed=1)
    predicted = (test.to(dtype) @ weight.T + bias).argmax(1)
    assert (predicted.numpy() == reference.predict(test.double().numpy())).mean() >= 0.998


def test_a_class_without_training_images_is_never_predicted_and_two_classes_are_a_case_like_any():
    features, labels = blobs(100, 5, 2)
    fit = fit_logistic(features, labels, 3)
    assert set((features @ fit.weight.T + fit.bias).argmax(1).tolist()) == {0, 1}


def test_the_score_does_not_depend_on_the_features_scale_offset_or_order():
    train, test = (Features(*blobs(300, 8, 4, seed=seed)) for seed in (0, 1))
    plain = LinearProbe().score(train, test, list("abcd"))
    for scale, shift in ((1e-8, 0.0), (1e6, 0.0), (0.01, 3.0)):
        scaled = (Features(x.features * scale + shift, x.labels) for x in (train, test))
        assert LinearProbe().score(*scaled, list("abcd"))["linear_top1"] == pytest.approx(
            plain["linear_top1"], abs=0.005
        )
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    turned = Features(train.features[order][:, torch.arange(7, -1, -1)], train.labels[order])
    assert LinearProbe().score(turned, Features(test.features.flip(1), test.labels), list("abcd"))["linear_top1"] == (
        pytest.approx(plain["linear_top1"], abs=0.005)
    )


def test_constant_features_change_nothing_but_for_rounding():
    train, test = (Features(*blobs(300, 8, 4, seed=seed)) for seed in (0, 1))
    plain = LinearProbe().score(train, test, list("abcd"))
    wider = [Features(torch.cat([x.features, torch.full((300, 2), 1234.567)], 1), x.labels) for x in (train, test)]
    _mean, scale = moments(wider[0].features)
    assert scale[8:].tolist() == [1.0, 1.0]
    assert LinearProbe().score(*wider, list("abcd"))["linear_top1"] == pytest.approx(plain["linear_top1"], abs=0.005)


def test_the_protocol_says_how_it_was_measured(dataset, encoder):
    scores = evaluators.build("linear_probe", C=0.5)(encoder, dataset)
    assert scores.protocols["linear_top1"].note == "logistic regression (C=0.5) on 120 standardised training features"


def test_a_fit_that_has_not_converged_says_so_in_the_protocol():
    train, test = (Features(*blobs(300, 8, 4, seed=seed)) for seed in (0, 1))
    notes = [LinearProbe(max_iter=most).score(train, test, list("abcd")).protocols["linear_top1"].note for most in (3, 500)]
    assert notes[0].endswith("standardised training features; not converged after 3 iterations")
    assert "converged" not in notes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"C": 0}, "C is 0; expected a finite positive number"), ({"max_iter": 0}, "max_iter is 0; expected at least 1")],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        evaluators.build("linear_probe", **arguments)


@pytest.mark.slow
def test_on_real_digits_it_predicts_what_scikit_learn_predicts():
    from sklearn.datasets import load_digits

    digits = load_digits()
    features, labels = torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target).long()
    mean, scale = moments(features[:1200])
    features = (features - mean) / scale
    fit = fit_logistic(features[:1200], labels[:1200], 10)
    reference = LogisticRegression(max_iter=5000, tol=1e-8).fit(features[:1200].double(), labels[:1200])
    predicted = (features[1200:] @ fit.weight.T + fit.bias).argmax(1).numpy()
    assert np.mean(predicted == reference.predict(features[1200:].double())) >= 0.998
