"""What a saved model says of images, by whatever it was saved with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitkit
from vitkit import backbones, evaluators, heads
from vitkit.data.dataset import build
from vitkit.errors import UsageError
from vitkit.models.saving import save

PREPARE = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "resize"}
IMAGES = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL = {"img_size": 8, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}


class Words(nn.Module):
    """Texts by their length."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.scale = nn.Parameter(torch.linspace(-1, 1, embed_dim))

    def encode_text(self, texts):
        return torch.stack([self.scale * len(text) + 1 for text in texts])


@pytest.fixture
def saved(tmp_path):
    def make(classes=("one", "two", "three"), **modules):
        torch.manual_seed(0)
        modules.setdefault("backbone", backbones.build("vit", **SMALL))
        save(tmp_path / "model", modules, preprocessing=PREPARE, classes=list(classes), arguments={})
        return vitkit.load(tmp_path / "model")

    return make


def test_a_classifiers_probabilities(saved):
    model = saved(classifier=heads.build("linear", in_dim=8, out_dim=3))
    found = model.predict(IMAGES)
    expected = model.classifier(model.encode_image(model.preprocess(IMAGES))).softmax(1)
    for one, row in zip(found, expected, strict=True):
        assert one.measure == "probability"
        assert one.label == model.classes[int(row.argmax())]
        assert sum(one.scores) == pytest.approx(1.0, abs=1e-6)
        assert one.scores == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-6)
    assert [one.labels for one in model.predict(IMAGES, top=2, batch_size=2)] == [one.labels[:2] for one in found]


def test_the_nearest_label_is_the_one_that_label_retrieval_finds(trained_run):
    model, digits = vitkit.load(trained_run), build("digits")
    found = model.predict(digits.test.images, top=1)
    assert {one.measure for one in found} == {"cosine"}
    labels = torch.tensor([model.classes.index(one.label) for one in found])
    accuracy = float((labels == digits.test.labels).float().mean())
    scores = model.evaluate(evaluators.build("label_retrieval"), digits)
    assert accuracy == pytest.approx(scores["m2_top1"], abs=0.005)


def test_texts_are_compared_with_projections(saved, monkeypatch):
    monkeypatch.setattr(backbones, "_added", {})
    backbones.add("words", Words)
    model = saved(
        text=backbones.build("words", embed_dim=6),
        text_projector=heads.build("linear", in_dim=6, out_dim=4),
        projector=heads.build("linear", in_dim=8, out_dim=4),
    )
    found = model.predict(IMAGES, labels=["a", "long words"])
    image = model.projector(model.encode_image(model.preprocess(IMAGES)))
    text = model.text_projector(model.text.encode_text(["a", "long words"]))
    expected = F.cosine_similarity(image[:, None], text[None], dim=-1)
    assert [one.scores for one in found] == [pytest.approx(sorted(row, reverse=True), abs=1e-5) for row in expected.tolist()]
    assert set(model.predict(IMAGES)[0].labels) == {"one", "two", "three"}
    with pytest.raises(UsageError, match="compares images with texts: give it some, with --label 'a text'"):
        saved(classes=[], text=backbones.build("words", embed_dim=4)).predict(IMAGES)


def test_a_model_that_cannot_predict_says_what_it_can(saved):
    model = saved()
    with pytest.raises(UsageError, match=r"this model has backbone \(vit\): `vitkit embed` gives its features"):
        model.predict(IMAGES)
    with pytest.raises(UsageError, match="only a model with a module named 'text' takes --label or labels="):
        model.predict(IMAGES, labels=["a"])
    with pytest.raises(UsageError, match="top is 0; expected at least 1"):
        saved(classifier=heads.build("linear", in_dim=8, out_dim=3)).predict(IMAGES, top=0)
    with pytest.raises(UsageError, match=r"the classifier gives \(5, 4\), but the model was saved with 3 classes"):
        saved(classifier=heads.build("linear", in_dim=8, out_dim=4)).predict(IMAGES)


def test_evaluating_prepares_images_as_training_did(saved):
    model, digits = saved(), build("digits")
    seen = []

    def look(own, dataset):
        seen.append((own, dataset.train.preprocessing.to_json(), dataset.test.preprocessing.to_json()))
        return vitkit.Scores({"x": 1.0})

    assert model.evaluate(look, digits.resized(20)) == {"x": 1.0}
    assert seen == [(model, PREPARE, PREPARE)]
    other = saved(backbone=backbones.build("vit", **{**SMALL, "in_chans": 1}))
    other.preprocessing = {"shape": [2, 8, 8], "mean": [0.5] * 2, "std": [0.25] * 2, "fit": "resize"}
    with pytest.raises(UsageError, match="images of digits have 1 channels; expected 2"):
        other.evaluate(look, digits)
