"""Few shots: nearest centroids as in scikit-learn, means over draws that the seed fixes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid

from vitkit import evaluators
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit_eval import FewShot
from vitkit_eval.few_shot import _draws, centroid_scores

CLASSES = ["a", "b", "c", "d"]


def blobs(n, d=6, k=4, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=torch.Generator().manual_seed(99)) * spread
    labels = torch.arange(n) % k
    return Features(centres[labels] + torch.randn(n, d, generator=generator), labels)


def test_the_nearest_centroid_is_scikit_learns():
    train, test = blobs(40), blobs(500, seed=1)
    reference = NearestCentroid().fit(train.features.numpy(), train.labels.numpy())
    centroids = torch.from_numpy(reference.centroids_).float()
    found = centroid_scores(test.features, centroids).argmax(1)
    assert (found.numpy() == reference.predict(test.features.numpy())).all()


def test_one_draw_is_the_classifier_that_was_described():
    train, test = blobs(80), blobs(200, seed=1)
    scores = FewShot(shots=[5], draws=1, seed=7).score(train, test, CLASSES)
    (chosen,) = _draws(train.labels, 4, 5, 1, 7)
    assert (train.labels[chosen] == torch.arange(4)[:, None]).all()
    assert len(chosen.unique()) == 20
    known, queries = F.normalize(train.features, dim=1), F.normalize(test.features, dim=1)
    reference = NearestCentroid().fit(known[chosen.flatten()].numpy(), train.labels[chosen.flatten()].numpy())
    expected = (reference.predict(queries.numpy()) == test.labels.numpy()).mean()
    assert scores == {"few_shot_5_top1": pytest.approx(expected)}
    assert scores.protocols["few_shot_5_top1"].note == "nearest centroid of 5 training images a class, mean of 1 draws"


def test_more_shots_help_and_the_interval_narrows_with_the_draws():
    train, test = blobs(400), blobs(400, seed=1)
    few, many = (FewShot(draws=draws).score(train, test, CLASSES) for draws in (20, 200))
    for scores in (few, many):
        assert 0.25 < scores["few_shot_1_top1"] < scores["few_shot_5_top1"] < scores["few_shot_10_top1"]
    notes = [scores.protocols["few_shot_1_top1"].note for scores in (few, many)]
    assert notes[0].startswith("nearest centroid of 1 training image a class, mean of 20 draws, ± 0.")
    widths = [float(note.split("± ")[1].split(" (95 %)")[0]) for note in notes]
    assert widths[1] < widths[0] / 2
    assert abs(few["few_shot_1_top1"] - many["few_shot_1_top1"]) < 2 * widths[0]


def test_the_interval_is_of_the_mean_over_draws():
    train, test = blobs(80), blobs(200, seed=1)
    scores = FewShot(shots=[2], draws=30).score(train, test, CLASSES)
    known, queries = F.normalize(train.features, dim=1), F.normalize(test.features, dim=1)
    hits = torch.stack(
        [
            (centroid_scores(queries, known[chosen].mean(1)).argmax(1) == test.labels).double().mean()
            for chosen in _draws(train.labels, 4, 2, 30, 0)
        ]
    )
    assert scores["few_shot_2_top1"] == pytest.approx(float(hits.mean()))
    assert f"± {1.96 * float(hits.std()) / 30**0.5:.4f} (95 %)" in scores.protocols["few_shot_2_top1"].note


def test_classes_that_are_one_score_chance_and_lengths_of_features_do_not_matter():
    train, test = blobs(80, spread=0.0), blobs(2000, seed=1, spread=0.0)
    assert FewShot(shots=[10]).score(train, test, CLASSES)["few_shot_10_top1"] == pytest.approx(0.25, abs=0.01)
    train, test = blobs(80), blobs(200, seed=1)
    longer = Features(train.features * torch.linspace(1, 9, 80)[:, None], train.labels)
    assert FewShot(draws=5).score(train, test, CLASSES) == FewShot(draws=5).score(longer, test, CLASSES)


def test_the_seed_chooses_the_draws_and_the_protocol_tells_how(dataset, encoder):
    first, again, other = (evaluators.build("few_shot", draws=3, seed=seed)(encoder, dataset) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert list(first) == ["few_shot_1_top1", "few_shot_5_top1", "few_shot_10_top1"]
    protocol = first.protocols["few_shot_10_top1"]
    assert (protocol.split, protocol.samples, protocol.chance, protocol.frozen) == ("test", 45, 1 / 3, "encoder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": []}, r"shots are \[\]; expected numbers of images a class, each at least 1"),
        ({"shots": [5, 0]}, r"shots are \[5, 0\]; expected"),
        ({"draws": 0}, "draws is 0; expected at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        evaluators.build("few_shot", **arguments)


def test_a_class_with_too_few_images_is_refused_before_anything_is_encoded(dataset):
    def never(images):
        raise AssertionError

    few = replace(dataset, train=dataset.train.subset(torch.arange(14)))  # 5, 5 and 4 of each class
    for act in (evaluators.build("few_shot", shots=[1, 5]).check, partial(evaluators.build("few_shot", shots=[1, 5]), never)):
        with pytest.raises(UsageError, match="5 shots need .* but there are only 4 of 'shade 2'; ask for fewer shots"):
            act(few)
    with pytest.raises(UsageError, match="5 shots need .* but there are only 3 of"):
        evaluators.build("few_shot", shots=[5], train_size=9).check(dataset)
    evaluators.build("few_shot", shots=[3], train_size=9).check(dataset)


def test_a_class_with_too_few_images_is_named():
    train = Features(torch.randn(12, 3), torch.tensor([0] * 5 + [1] * 5 + [2] * 2))
    with pytest.raises(UsageError, match="5 shots need .* but there are only 2 of 'c'; ask for fewer shots"):
        FewShot(shots=[1, 5]).score(train, train, ["a", "b", "c"])
