"""Linear probe and nearest neighbours: agreement with scikit-learn, and models left as they were."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from vitkit import evaluators
from vitkit.data import from_store
from vitkit.errors import UsageError
from vitkit.store import Stored
from vitkit_eval import confusion_matrix, extract_features, fit_logistic, topk_accuracy
from vitkit_eval.knn import vote


def blobs(n, d, k, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=torch.Generator().manual_seed(99)) * spread
    labels = torch.arange(n) % k
    return centres[labels] + torch.randn(n, d, generator=generator), labels


@pytest.fixture
def dataset():
    """Images whose brightness says the class, with noise."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", 120), ("test", 45)):
        labels = torch.arange(n) % 3
        noise = torch.randint(0, 60, (n, 1, 4, 4), generator=generator)
        tensors[f"{split}.images"] = (labels.view(-1, 1, 1, 1) * 90 + noise).to(torch.uint8)
        tensors[f"{split}.labels"] = labels
    return from_store(Stored("shades", ["dark", "grey", "light"], tensors))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(16)
        self.weight = nn.Parameter(torch.ones(16))

    def encode_image(self, images):
        return self.dropout(self.norm(images.flatten(1))) * self.weight


def test_the_probe_minimises_what_scikit_learn_minimises():
    features, labels = blobs(300, 8, 4, spread=1.0)
    weight, bias = fit_logistic(features.double(), labels, 4, C=0.3, max_iter=500)
    reference = LogisticRegression(C=0.3, max_iter=5000, tol=1e-10).fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(weight.numpy(), reference.coef_, atol=2e-3)
    np.testing.assert_allclose((bias - bias.mean()).numpy(), reference.intercept_ - reference.intercept_.mean(), atol=2e-3)
    test, _ = blobs(200, 8, 4, seed=1, spread=1.0)
    predicted = (test.double() @ weight.T + bias).argmax(1)
    assert (predicted.numpy() == reference.predict(test.numpy())).mean() == 1.0


def test_the_vote_is_scikit_learns_with_the_same_weights():
    train, labels = blobs(200, 6, 5)
    test, _ = blobs(60, 6, 5, seed=2)
    reference = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
    ).fit(train.numpy(), labels.numpy())
    votes = vote(train, labels, test, 5, k=7, temperature=0.1)
    assert (votes.argmax(1).numpy() == reference.predict(test.numpy())).all()
    probabilities = votes / votes.sum(1, keepdim=True)
    np.testing.assert_allclose(probabilities.numpy(), reference.predict_proba(test.numpy()), atol=1e-4)


@pytest.mark.parametrize("name", ["linear_probe", "knn"])
def test_scores_come_with_protocol_and_confusion_and_the_model_is_left_as_it_was(dataset, name):
    model = Encoder()
    model.dropout.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    scores = evaluators.build(name)(model, dataset)
    ((column, value),) = scores.items()
    assert value > 0.8
    protocol = scores.protocols[column]
    assert (protocol.split, protocol.samples, protocol.chance, protocol.frozen) == ("test", 45, 1 / 3, "encoder")
    (picture,) = scores.pictures.values()
    assert picture.matrix.sum() == 45
    assert model.training
    assert not model.dropout.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert model.weight.grad is None
    assert evaluators.build(name)(model, dataset) == scores


@pytest.mark.parametrize("name", ["linear_probe", "knn"])
def test_under_autocast_only_the_features_are_of_lower_precision(dataset, name):
    plain = evaluators.build(name)(Encoder(), dataset)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluators.build(name)(Encoder(), dataset) == plain


def test_a_backbone_without_encode_image_is_pooled_over_its_tokens(dataset):
    class Tokens(nn.Module):
        def forward(self, images):
            return images.flatten(2).transpose(1, 2)  # (b 16 1)

    found = extract_features(Tokens(), dataset.test, batch_size=7)
    expected = torch.cat([batch["images"].mean(dim=(1, 2, 3)) for batch in dataset.test.batches(45).epoch(0)])
    torch.testing.assert_close(found.features[:, 0], expected)
    assert torch.equal(found.labels, dataset.test.labels)


def test_counts():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.3, 0.4, 0.3]])
    assert topk_accuracy(scores, torch.tensor([1, 2, 1])) == pytest.approx(2 / 3)
    assert topk_accuracy(scores, torch.tensor([1, 2, 1]), k=2) == 1.0
    assert topk_accuracy(scores, torch.tensor([0, 0, 0]), k=9) == 1.0
    matrix = confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_what_cannot_be_measured_says_so(dataset):
    class Broken(nn.Module):
        def encode_image(self, images):
            return images.flatten(1) * float("nan")

    with pytest.raises(UsageError, match="features are not finite"):
        evaluators.build("linear_probe")(Broken(), dataset)
    with pytest.raises(UsageError, match="k is 500, but there are only 120 training images"):
        evaluators.build("knn", k=500)(Encoder(), dataset)
    with pytest.raises(UsageError, match="holds no images"):
        extract_features(Encoder(), dataset.test.subset(torch.arange(0)))
    with pytest.raises(UsageError, match="at least two classes"):
        fit_logistic(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), 3)
    with pytest.raises(UsageError, match="C is 0; expected a positive"):
        evaluators.build("linear_probe", C=0)


def test_a_capped_probe_uses_so_many_images_of_each_class(dataset):
    split = dataset.train.take(30, seed=3)
    assert torch.bincount(split.labels).tolist() == [10, 10, 10]
    scores = evaluators.build("linear_probe", train_size=30)(Encoder(), dataset)
    assert "on 30 standardised" in scores.protocols["linear_top1"].note
