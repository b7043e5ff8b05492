"""Nearest neighbours vote as in scikit-learn, and equally near ones as said."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from vitkit import evaluators
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit_eval import KNN, knn
from vitkit_eval.knn import vote
from vitkit_eval.ties import highest


def blobs(n, d, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(n) % k
    return centres[labels] + torch.randn(n, d, generator=generator), labels


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_vote_is_scikit_learns_with_the_same_weights(k, temperature):
    train, labels = blobs(200, 6, 5)
    test, _ = blobs(60, 6, 5, seed=2)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.numpy(), labels.numpy())
    votes = vote(train, labels, test, 5, k=k, temperature=temperature)
    assert (votes.argmax(1).numpy() == reference.predict(test.numpy())).all()
    probabilities = votes / votes.sum(1, keepdim=True)
    np.testing.assert_allclose(probabilities.numpy(), reference.predict_proba(test.numpy()), atol=1e-4)


def test_a_training_image_is_its_own_nearest_and_lengths_of_features_do_not_matter():
    train, labels = blobs(100, 6, 5)
    assert (vote(train, labels, train, 5, k=1, temperature=0.07).argmax(1) == labels).all()
    test, _ = blobs(50, 6, 5, seed=1)
    votes = vote(train, labels, test, 5, k=9, temperature=0.07).double()
    lengths = torch.rand(100, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.testing.assert_close(
        vote(train * lengths, labels, test * 1e3, 5, k=9, temperature=0.07).double(), votes, rtol=1e-4, atol=1e4
    )


@pytest.mark.parametrize("k", [1, 4, 12])
def test_of_equally_near_images_the_earlier_are_nearer(k):
    similarity = torch.randint(0, 4, (50, 12), generator=torch.Generator().manual_seed(k)) / 4
    values, index = highest(similarity.clone(), k)
    ordered = similarity.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, ordered.values[:, :k])
    assert torch.equal(index, ordered.indices[:, :k])


def test_equal_votes_go_to_the_class_of_lower_number():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    for labels in ([2, 1, 2, 1], [1, 2, 1, 2]):
        votes = vote(train, torch.tensor(labels), train[:1], 3, k=4, temperature=0.07)
        assert votes.tolist() == [[0, 2**33, 2**33]]
        assert votes.argmax(1).item() == 1


def test_the_votes_do_not_depend_on_how_many_are_counted_at_once(monkeypatch):
    train, labels = blobs(90, 6, 3)
    test, _ = blobs(40, 6, 3, seed=1)
    whole = vote(train, labels, test, 3, k=5, temperature=0.07)
    sizes = []
    monkeypatch.setattr(
        knn, "highest", lambda similarity, k: (sizes.append(similarity.numel()), highest(similarity, k))[1]
    )
    for limit in (1, 90 * 7, 90 * 40):
        monkeypatch.setattr(knn, "SIMILARITIES", limit)
        assert torch.equal(vote(train, labels, test, 3, k=5, temperature=0.07).argmax(1), whole.argmax(1))
        assert max(sizes) <= max(limit, 90)
        sizes.clear()


def test_a_class_without_a_vote_is_no_hit_among_the_top_five():
    classes = [str(number) for number in range(12)]
    train = Features(torch.eye(12), torch.arange(12))
    near = torch.eye(12)[:2] + 0.5 * torch.eye(12)[2:4]  # nearest to their class and to one other
    scores = KNN(k=2).score(train, Features(near, torch.tensor([0, 3])), classes)
    assert scores["knn_top1"] == 0.5
    assert scores["knn_top5"] == 1.0
    scores = KNN(k=2).score(train, Features(near, torch.tensor([5, 6])), classes)  # no neighbour voted for these
    assert scores["knn_top5"] == 0.0


def test_equal_votes_share_the_hit():
    train = Features(torch.eye(4)[:2], torch.tensor([0, 1]))
    between = Features(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([1]))
    assert KNN(k=2).score(train, between, list("abc"))["knn_top1"] == 0.5


def test_the_protocol_says_how_it_was_measured(dataset, encoder):
    scores = evaluators.build("knn", k=5)(encoder, dataset)
    assert scores.protocols["knn_top1"].note == "5 nearest of 120 training images, cosine, T=0.07"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0; expected at least 1"),
        ({"temperature": 0}, "temperature is 0; expected a finite positive number"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        evaluators.build("knn", **arguments)


def test_more_neighbours_than_training_images_are_refused_before_anything_is_encoded(dataset, encoder):
    def never(images):
        raise AssertionError

    for evaluator, count in ((KNN(k=500), 120), (KNN(k=31, train_size=30), 30)):
        with pytest.raises(UsageError, match=f"but there are only {count} training images; take a smaller k"):
            evaluator(never, dataset)
    few = Features(torch.randn(3, 2), torch.tensor([0, 1, 0]))
    with pytest.raises(UsageError, match="k is 4, but there are only 3"):
        KNN(k=4).score(few, few, ["a", "b"])
