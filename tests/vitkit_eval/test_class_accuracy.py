"""What accuracy to believe: the interval and the classes of a model's own classifier, and the sentences about them."""

import numpy as np
import pytest
import torch

from vitkit import evaluators
from vitkit.contracts import Proportions
from vitkit.errors import UsageError
from vitkit.intervals import wilson
from vitkit_eval import believable


class Guesses(torch.nn.Module):
    """The true class of an image by its brightness, except that shade 1 is taken for shade 0 where the noise is low."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = torch.nn.Identity()

    def encode_image(self, images):
        level = images.mean(dim=(1, 2, 3))
        return torch.stack([-(level + 1.2).abs() + 0.35, -level.abs(), -(level - 1.2).abs()], dim=1)


def test_the_interval_and_the_classes_are_those_of_the_confusion(dataset):
    scores = evaluators.build("class_accuracy")(Guesses(), dataset)
    matrix = evaluators.build("accuracy")(Guesses(), dataset).figures["accuracy_confusion"].matrix
    hits, totals = matrix.diagonal(), matrix.sum(1)
    assert (scores["accuracy_low"], scores["accuracy_high"]) == pytest.approx(wilson(int(hits.sum()), 45))
    assert scores["mean_class_accuracy"] == pytest.approx((hits / totals).mean())
    assert scores["worst_class_accuracy"] == pytest.approx((hits / totals).min())
    figure = scores.figures["class_accuracy"]
    assert figure.names == ["shade 0", "shade 1", "shade 2"]
    assert figure.hits.tolist() == hits.tolist()
    assert figure.totals.tolist() == totals.tolist()
    protocol = scores.protocols["worst_class_accuracy"]
    assert (protocol.split, protocol.samples, protocol.chance) == ("test", 45, 1 / 3)
    assert protocol.note == f"shade {int((hits / totals).argmin())}; the model's own classifier"
    assert scores.protocols["accuracy_low"].chance is None
    assert set(evaluators.build("class_accuracy", test_size=9)(Guesses(), dataset, "val")) == {f"val_{name}" for name in scores}


def test_it_refuses_what_accuracy_refuses(dataset, encoder):
    with pytest.raises(UsageError, match="class_accuracy needs a model with a classifier; Encoder has none: use 'linear_probe'"):
        evaluators.build("class_accuracy")(encoder, dataset)


def test_the_sentences_give_interval_weakest_class_and_what_is_not_known():
    text = believable(Proportions(["cat", "dog", "elk"], np.array([18, 9, 0]), np.array([20, 15, 0])), chosen_on=12)
    assert text == (
        "27 of 35 test images are right (77.1%). On images like them, believe an accuracy between 61% and 88% "
        "(95 % interval; guessing: 33%). "
        "The weakest class is dog: 9 of 15 right, between 36% and 80%. "
        "Nothing is known of elk: there is no test image. "
        "35 test images are few: with 200 the interval would be at most 14 points wide. "
        "The checkpoint was chosen on 12 other images, so its accuracy on those is too good to believe."
    )


def test_of_many_images_that_are_all_right_little_is_left_to_say():
    text = believable(Proportions(["cat", "dog"], np.array([150, 150]), np.array([150, 150])))
    assert text == (
        "300 of 300 test images are right (100.0%). On images like them, believe an accuracy between 99% and 100% "
        "(95 % interval; guessing: 50%)."
    )


def test_with_200_images_an_interval_is_at_most_14_points_wide():
    assert max(high - low for low, high in (wilson(hits, 200) for hits in range(201))) < 0.14
