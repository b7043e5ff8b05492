"""A loaded model evaluates a dataset as it sees it: classes by name, images in its own colours."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vitkit import backbones, evaluators, heads
from vitkit.contracts import UNLABELLED, Scores
from vitkit.data import ImageDataset, ImageSplit, Preprocessing
from vitkit.errors import UsageError
from vitkit.models import load, save
from vitkit.models.classes import with_class_order

NAMES = [str(number) for number in range(12)]
AS_TEXT = sorted(NAMES)  # 0, 1, 10, 11, 2, ...: the order of a folder's names


def dataset(classes: list[str], *, channels: int = 1) -> ImageDataset:
    """Images of a shade each, which stands for the class of that name."""
    shades = torch.arange(12).repeat_interleave(10)
    images = (shades * 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, 8, 8).contiguous()
    labels = torch.tensor([classes.index(NAMES[int(shade)]) for shade in shades])
    preprocessing = Preprocessing((channels, 8, 8), (0.5,) * channels, (0.25,) * channels, "pad")
    split = ImageSplit(images, labels, preprocessing)
    return ImageDataset("shades", classes, split, split, val=split)


class Shades(nn.Module):
    """The class of an image by its shade."""

    embed_dim = 12

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        shade = ((x.mean(dim=(1, 2, 3)) * 0.25 + 0.5) * 255 / 20).round()
        return torch.eye(12)[shade.long().clamp(0, 11)][:, None]


class Identity(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.fixture
def model(tmp_path, monkeypatch):
    def make(channels: int = 1):
        monkeypatch.setattr(backbones, "_added", {})
        monkeypatch.setattr(heads, "_added", {})
        backbones.add("shades", Shades)
        heads.add("identity", Identity)
        preprocessing = Preprocessing((channels, 8, 8), (0.5,) * channels, (0.25,) * channels, "pad").to_json()
        parts = {"backbone": backbones.build("shades", channels=channels), "classifier": heads.build("identity")}
        save(tmp_path, parts, preprocessing=preprocessing, classes=NAMES, arguments={})
        return load(tmp_path)

    return make


def plain_accuracy(model, data, split="test"):
    """An evaluator of somebody who compares numbers and never looks at names."""
    images = getattr(data, split)
    batch = model.preprocess(images.images)
    return Scores({"accuracy": float((model.classifier(model.encode_image(batch)).argmax(1) == images.labels).float().mean())})


@pytest.mark.parametrize("classes", [NAMES, AS_TEXT, NAMES[::-1]], ids=["equal", "as text", "reversed"])
def test_labels_follow_the_names_of_classes_in_every_evaluator(model, classes):
    loaded = model()
    assert loaded.evaluate(plain_accuracy, dataset(classes))["accuracy"] == 1.0
    assert loaded.evaluate(evaluators.build("accuracy"), dataset(classes))["accuracy_top1"] == 1.0
    assert loaded.evaluate(plain_accuracy, dataset(classes), "val")["accuracy"] == 1.0


def test_other_classes_are_refused_by_an_evaluator_that_needs_them(model):
    with pytest.raises(UsageError, match="the model's classes are"):
        model().evaluate(evaluators.build("accuracy"), replace(dataset(NAMES), classes=[f"c{name}" for name in NAMES]))


def test_numbers_are_compared_as_numbers_and_masked_labels_stay():
    padded = replace(dataset(NAMES), classes=[f"{number:02}" for number in range(12)])
    assert with_class_order(padded, NAMES).classes == NAMES
    data = dataset(AS_TEXT)
    masked = replace(data, train=replace(data.train, labels=torch.full_like(data.train.labels, UNLABELLED)))
    ordered = with_class_order(masked, NAMES)
    assert set(ordered.train.labels.tolist()) == {UNLABELLED}
    assert torch.equal(ordered.test.labels, dataset(NAMES).test.labels)
    assert torch.equal(masked.test.labels, dataset(AS_TEXT).test.labels)
    assert ordered.test.classes == tuple(NAMES)


def test_classes_that_are_other_ones_or_not_unique_leave_the_dataset_as_it_is():
    data = dataset(NAMES)
    assert with_class_order(data, ["a", "b"]) is data
    assert with_class_order(replace(data, classes=["a"] * 12), NAMES[::-1]).classes == ["a"] * 12


def test_a_dataset_whose_labels_cannot_be_replaced_is_refused_when_its_order_differs():
    class Fixed:
        name, classes = "fixed", AS_TEXT

    with pytest.raises(UsageError, match="fixed lists the model's classes in another order .10 ≠ 2, 11 ≠ 3, 2 ≠ 4."):
        with_class_order(Fixed(), NAMES)


@pytest.mark.parametrize(("channels", "images"), [(1, 3), (3, 1)])
def test_a_model_of_grey_images_is_evaluated_on_rgb_ones_and_the_other_way_round(model, channels, images):
    loaded = model(channels)
    assert loaded.evaluate(evaluators.build("accuracy"), dataset(NAMES, channels=images))["accuracy_top1"] == 1.0
    assert loaded.evaluate(evaluators.build("knn", k=3), dataset(NAMES, channels=images))["knn_top1"] == 1.0


def test_other_numbers_of_channels_are_refused(model):
    with pytest.raises(UsageError, match="images of shades have 4 channels; expected 1"):
        model().evaluate(evaluators.build("accuracy"), dataset(NAMES, channels=4))
