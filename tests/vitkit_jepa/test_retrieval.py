"""Label retrieval: exact cases, ties, and what it leaves alone."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkit import backbones, evaluators, heads
from vitkit.contracts import Attention, Confusion, Embeddings
from vitkit.data import ImageDataset, ImageSplit, Preprocessing
from vitkit.errors import UsageError
from vitkit_jepa import LabelRetrieval

CLASSES = ["a", "b", "c", "d"]


def dataset(n: int = 30) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % len(CLASSES)
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, 0] = (labels * 60).to(torch.uint8)  # an image shows its class in its first pixel
    split = ImageSplit(images, labels, Preprocessing((1, 8, 8), (0.0,), (1.0,)))
    return ImageDataset("made", CLASSES, train=split, test=split)


class Oracle(nn.Module):
    """Reads the class off the pixel; with a label, moves towards that label's direction. `wrong` classes see another."""

    num_classes = 4

    def __init__(self, wrong: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.seen = torch.tensor([(k + 1) % 4 if k in wrong else k for k in range(4)])

    def encode_image(self, x: Tensor) -> Tensor:
        return torch.eye(4)[self.seen[(x[:, 0, 0, 0] * 255 / 60).round().long()]]

    def encode_label(self, labels: Tensor) -> Tensor:
        return torch.eye(4)[labels]

    def encode_multimodal(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.encode_image(x) + self.encode_label(labels)

    def label_attention(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.rand(len(x), 2, 2)


class Both(nn.Module):
    """A backbone and a projector under the names that a JEPA gives them."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector


def oracle(wrong: tuple[int, ...] = ()) -> Both:
    return Both(Oracle(wrong), nn.Identity())


def real() -> Both:
    torch.manual_seed(0)
    backbone = backbones.build(
        "multimodal_vit", num_classes=4, img_size=8, embed_dim=16, depth=1, num_heads=2, dropout=0.5
    )
    return Both(backbone, heads.build("mlp", in_dim=16, out_dim=8))


@pytest.mark.parametrize("space", ["projector", "encoder"])
def test_a_model_that_knows_scores_one(space: Any) -> None:
    scores = evaluators.build("label_retrieval", space=space)(oracle(), dataset())
    assert scores == {"m1_top1": 1.0, "m1_top3": 1.0, "m2_top1": 1.0, "m2_top3": 1.0}


def test_confusion_matrices_count_what_was_retrieved() -> None:
    data = dataset()
    scores = LabelRetrieval(batch_size=7)(oracle(wrong=(1,)), data)
    for method in ("m1", "m2"):
        confusion = scores.figures[f"{method}_confusion"]
        assert isinstance(confusion, Confusion)
        assert confusion.matrix.tolist() == [[8, 0, 0, 0], [0, 0, 8, 0], [0, 0, 7, 0], [0, 0, 0, 7]]
        assert scores[f"{method}_top1"] == pytest.approx(22 / 30)


def test_protocols_say_chance_and_how_many() -> None:
    scores = LabelRetrieval()(oracle(), dataset())
    for method in ("m1", "m2"):
        for k in (1, 3):
            protocol = scores.protocols[f"{method}_top{k}"]
            assert (protocol.split, protocol.samples, protocol.chance) == ("test", 30, k / 4)


def test_a_model_that_never_saw_labels_scores_chance_exactly() -> None:
    data = dataset()
    data = ImageDataset(
        "few", CLASSES, train=data.train, test=data.test.subset(torch.arange(0, 30, 4))
    )  # one class alone
    scores = LabelRetrieval()(real(), data)
    assert scores == pytest.approx({"m1_top1": 0.25, "m1_top3": 0.75, "m2_top1": 0.25, "m2_top3": 0.75})


def test_classes_of_a_model_that_names_them_are_matched_by_name() -> None:
    data, model = dataset(), oracle(wrong=(1,))
    expected = LabelRetrieval()(model, data)
    turned = [2, 0, 3, 1]  # label l is label turned[l] in a dataset that has its classes in another order
    other = replace(
        data,
        classes=[CLASSES[turned.index(number)] for number in range(4)],
        test=replace(data.test, labels=torch.tensor(turned)[data.test.labels]),
    )
    assert LabelRetrieval()(model, other)["m2_top1"] < 0.5
    model.classes = CLASSES
    scores = LabelRetrieval()(model, other)
    assert scores == expected
    assert scores.figures["m1_confusion"].matrix.trace() == expected.figures["m1_confusion"].matrix.trace()
    with pytest.raises(UsageError, match="the model's classes are 'a', 'b', 'c', 'd', those of made are 'a', 'b', 'c', 'e'; eval"):
        LabelRetrieval()(model, replace(data, classes=["a", "b", "c", "e"]))


def test_on_the_validation_split_names_and_protocols_say_so() -> None:
    data = dataset()
    with_val = replace(data, test=data.test.subset(torch.arange(9)))
    object.__setattr__(with_val, "val", data.test)
    expected, scores = LabelRetrieval()(oracle((1,)), data), LabelRetrieval()(oracle((1,)), with_val, split="val")
    assert scores == {f"val_{name}": value for name, value in expected.items()}
    assert {(p.split, p.kind, p.direction) for p in scores.protocols.values()} == {("val", "proportion", "max")}
    assert set(scores.figures) == {f"val_{name}" for name in expected.figures}


def test_batch_size_changes_nothing() -> None:
    whole, cut = (trained_scores(batch_size) for batch_size in (30, 7))
    assert whole == cut


def trained_scores(batch_size: int) -> dict[str, float]:
    model = real()
    torch.nn.init.normal_(model.backbone.label_embed.weight)
    return dict(LabelRetrieval(batch_size=batch_size)(model, dataset()))


def test_mode_gradients_and_random_state_stay_as_they_were() -> None:
    model, state = real().train(), torch.get_rng_state()
    LabelRetrieval()(model, dataset())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_pictures_are_plain_arrays_of_matching_sizes() -> None:
    figures = LabelRetrieval(attention_samples=4)(real(), dataset()).figures
    embeddings, attention = figures["embeddings"], figures["label_attention"]
    assert isinstance(embeddings, Embeddings)
    assert embeddings.features.shape == (30, 16)
    assert isinstance(attention, Attention)
    assert attention.images.shape == (4, 1, 8, 8)
    assert attention.maps.shape == (4, 2, 2)
    assert attention.maps.max() == pytest.approx(1.0)
    assert sorted(attention.captions) == ["label a", "label b", "label c", "label d"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LabelRetrieval(space="nowhere"), "space is 'nowhere'; expected 'projector', 'encoder'"),
        (lambda: LabelRetrieval(batch_size=0), "batch_size is 0; expected at least 1"),
        (lambda: LabelRetrieval(attention_samples=-1), "attention_samples is -1"),
        (lambda: LabelRetrieval()(nn.Linear(2, 2), dataset()), "needs a model whose .backbone takes labels"),
        (
            lambda: LabelRetrieval()(oracle(), SimpleNamespace(name="ten", classes=["x"] * 10)),
            "has 4 labels, and ten has 10",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
