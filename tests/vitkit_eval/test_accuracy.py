"""A model's own classifier is counted as it stands, and left as it was."""

import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.metrics import confusion_matrix as reference_confusion
from torch import Tensor, nn

from vitkit import evaluators
from vitkit.errors import UsageError


class Classified(nn.Module):
    """Mean brightness and its square, with a classifier whose dropout would show."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, classes))
        torch.manual_seed(3)
        nn.init.normal_(self.classifier[1].weight)

    def encode_image(self, images: Tensor) -> Tensor:
        brightness = images.mean(dim=(1, 2, 3))
        return torch.stack([brightness, brightness.square()], dim=1)


def test_accuracy_is_scikit_learns_and_comes_with_its_confusion(dataset):
    model = Classified()
    scores = evaluators.build("accuracy")(model, dataset)
    (batch,) = dataset.test.batches(45).epoch(0)
    with torch.no_grad():
        guesses = model.classifier[1](model.encode_image(batch["images"])).argmax(1)
    assert dict(scores) == {"accuracy_top1": pytest.approx(accuracy_score(batch["labels"], guesses))}
    picture = scores.figures["accuracy_confusion"]
    assert (picture.matrix == reference_confusion(batch["labels"], guesses)).all()
    protocol = scores.protocols["accuracy_top1"]
    assert (protocol.split, protocol.samples, protocol.chance, protocol.frozen) == ("test", 45, 1 / 3, "")
    assert protocol.note == "the model's own classifier"
    assert model.classifier.training
    assert evaluators.build("accuracy", test_size=9)(model, dataset).protocols["accuracy_top1"].samples == 9


def test_with_many_classes_the_top_five_are_counted_too(shades):
    scores = evaluators.build("accuracy")(Classified(12), shades(train=240, test=60, classes=12))
    assert 0 <= scores["accuracy_top1"] <= scores["accuracy_top5"] <= 1
    assert scores.protocols["accuracy_top5"].chance == 5 / 12


def test_what_has_no_classifier_for_these_classes_says_so(dataset, encoder):
    with pytest.raises(UsageError, match="accuracy needs a model with a classifier; Encoder has none: use 'linear_probe'"):
        evaluators.build("accuracy")(encoder, dataset)
    with pytest.raises(
        UsageError,
        match=r"gave \(45, 5\) for 45 images of 3 classes; evaluate it on the dataset it was trained on",
    ):
        evaluators.build("accuracy")(Classified(5), dataset)
