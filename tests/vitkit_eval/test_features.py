"""Features of every image once, from models left as they were, on one process and on two."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit import evaluators
from vitkit.data import Stored, from_store
from vitkit.errors import UsageError, VitkitError
from vitkit.models import evaluating, extract_features, feature_cache
from vitkit_eval import confusion_matrix, frozen_features, topk_accuracy

NAMES = ["linear_probe", "knn"]
ALL = [*NAMES, "few_shot", "silhouette"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_come_with_protocol_and_confusion_and_the_model_is_left_as_it_was(dataset, encoder, name):
    encoder.dropout.eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    scores = evaluators.build(name)(encoder, dataset)
    ((column, value),) = scores.items()
    assert value > 0.8
    protocol = scores.protocols[column]
    assert (protocol.split, protocol.samples, protocol.chance, protocol.frozen) == ("test", 45, 1 / 3, "encoder")
    (picture,) = scores.figures.values()
    assert picture.matrix.sum() == 45
    assert picture.matrix.trace() == round(45 * value)
    assert encoder.training
    assert not encoder.dropout.training
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in before.items())
    assert encoder.weight.grad is None
    assert evaluators.build(name)(encoder, dataset) == scores


def test_mode_and_random_state_come_back_after_an_error_too(encoder):
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), evaluating(encoder) as device:
        assert (device.type, encoder.training, encoder.dropout.training) == ("cpu", False, False)
        assert torch.is_inference_mode_enabled()
        torch.rand(3)
        raise RuntimeError("inside")
    assert encoder.training
    assert encoder.dropout.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ALL)
def test_the_scores_are_the_same_under_autocast_and_without_gradients(dataset, encoder, name):
    plain = evaluators.build(name)(encoder, dataset)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with context:
            assert evaluators.build(name)(encoder, dataset) == plain


def test_under_autocast_the_encoder_computes_in_its_precision_and_features_are_float32(dataset):
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(16, 4)

        def encode_image(self, images: Tensor) -> Tensor:
            self.seen = self.net(images.flatten(1))
            return self.seen

    model = Linear()
    with torch.autocast("cpu", torch.bfloat16):
        found = extract_features(model, dataset.test)
    assert model.seen.dtype == torch.bfloat16
    assert found.features.dtype == torch.float32
    assert torch.equal(found.features, model.seen.float())


def test_a_backbone_without_encode_image_is_pooled_over_its_tokens(dataset):
    class Tokens(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(2).transpose(1, 2)  # (b 16 1)

    found = extract_features(Tokens(), dataset.test, batch_size=7)
    expected = torch.cat([batch["images"].mean(dim=(1, 2, 3)) for batch in dataset.test.batches(45).epoch(0)])
    torch.testing.assert_close(found.features[:, 0], expected)
    assert torch.equal(found.labels, dataset.test.labels)


def test_capped_splits_hold_the_classes_evenly_and_the_seed_chooses(dataset, encoder):
    train, test = frozen_features(encoder, dataset, train_size=30, test_size=9, seed=3)
    assert torch.bincount(train.labels).tolist() == [10, 10, 10]
    assert torch.bincount(test.labels).tolist() == [3, 3, 3]
    again, _ = frozen_features(encoder, dataset, train_size=30, test_size=9, seed=3)
    other, _ = frozen_features(encoder, dataset, train_size=30, test_size=9, seed=4)
    assert torch.equal(train.features, again.features)
    assert not torch.equal(train.features, other.features)
    for name in NAMES:
        scores = evaluators.build(name, train_size=30, test_size=9)(encoder, dataset)
        (protocol,) = scores.protocols.values()
        assert protocol.samples == 9
        assert " 30 " in protocol.note


def test_evaluators_that_share_features_compute_them_once_and_score_the_same(dataset, encoder, monkeypatch):
    counted = []
    encode = type(encoder).encode_image
    monkeypatch.setattr(type(encoder), "encode_image", lambda self, x: counted.append(len(x)) or encode(self, x))
    evaluate = [evaluators.build(name, **sizes) for sizes in ({}, {"train_size": 30, "seed": 2}) for name in NAMES]
    alone = [evaluator(encoder, dataset) for evaluator in evaluate]
    assert sum(counted) == 2 * (120 + 45) + 2 * (30 + 45)
    counted.clear()
    with feature_cache():
        together = [evaluator(encoder, dataset) for evaluator in evaluate]
        assert sum(counted) == 120 + 45 + 30
        assert extract_features(encoder, dataset.test) is extract_features(encoder, dataset.test)
        with feature_cache():
            extract_features(encoder, dataset.train)
        assert sum(counted) == 120 + 45 + 30
    assert together == alone
    assert [scores.protocols for scores in together] == [scores.protocols for scores in alone]
    extract_features(encoder, dataset.test)
    assert sum(counted) == 120 + 45 + 30 + 45


def test_other_weights_precisions_models_and_splits_share_nothing(dataset, encoder):
    with feature_cache():
        first = extract_features(encoder, dataset.test)
        with torch.no_grad():
            encoder.weight.mul_(2)
        second = extract_features(encoder, dataset.test)
        torch.testing.assert_close(second.features, 2 * first.features)
        encoder.load_state_dict({name: value.clone() for name, value in encoder.state_dict().items()})
        assert extract_features(encoder, dataset.test) is not second
        third = extract_features(encoder, dataset.test)
        with torch.autocast("cpu", torch.bfloat16):
            assert extract_features(encoder, dataset.test) is not third
        assert len(extract_features(encoder, dataset.train).labels) == 120
        assert extract_features(encoder, dataset.test, batch_size=7) is not third
        assert extract_features(Pixels(), dataset.test) is not extract_features(Pixels(), dataset.test)
        assert extract_features(encoder, dataset.test) is third


def test_shared_features_end_with_their_block_and_an_error_leaves_none(dataset, encoder):
    with pytest.raises(RuntimeError, match="inside"), feature_cache():
        kept = extract_features(encoder, dataset.test)
        raise RuntimeError("inside")
    assert extract_features(encoder, dataset.test) is not kept


@pytest.mark.parametrize("name", NAMES)
def test_with_many_classes_the_top_five_are_counted_too(shades, encoder, name):
    scores = evaluators.build(name)(encoder, shades(train=240, test=60, classes=12))
    top1, top5 = (f"{'linear' if name == 'linear_probe' else name}_top{k}" for k in (1, 5))
    assert set(scores) == {top1, top5}
    assert scores[top1] <= scores[top5]
    assert scores.protocols[top5].chance == 5 / 12


def test_counts():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.3, 0.4, 0.3]])
    assert topk_accuracy(scores, torch.tensor([1, 2, 1])) == pytest.approx(2 / 3)
    assert topk_accuracy(scores, torch.tensor([1, 2, 1]), k=2) == 1.0
    assert topk_accuracy(scores, torch.tensor([0, 0, 0]), k=9) == 1.0
    matrix = confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_equal_scores_share_their_places_as_over_all_orders_and_what_is_no_number_is_last():
    scores = torch.randint(0, 3, (400, 6), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(400) % 6
    orders = [torch.tensor(order) for order in permutations(range(6))]
    for k in range(1, 7):  # the mean over all orders of the classes, of equal ones the first in that order
        first = [scores[:, order].argsort(dim=1, descending=True, stable=True)[:, :k] for order in orders]
        hits = [(order[top] == labels[:, None]).any(1).double().mean() for order, top in zip(orders, first, strict=True)]
        assert topk_accuracy(scores, labels, k) == pytest.approx(float(torch.stack(hits).mean()))
    assert [topk_accuracy(torch.zeros(3, 4), torch.arange(3), k) for k in (1, 3, 4)] == pytest.approx([1 / 4, 3 / 4, 1])
    assert topk_accuracy(torch.tensor([[3.0, 3.0, 0.0]]), torch.tensor([0]), 1) == 0.5
    assert topk_accuracy(torch.full((6, 3), float("nan")), torch.arange(6) % 3) == 0.0
    assert topk_accuracy(torch.tensor([[float("nan"), 1.0]]), torch.tensor([1])) == 0.0
    assert topk_accuracy(torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([2]), 3) == 0.0


@pytest.mark.parametrize("name", [*ALL, "accuracy"])
def test_on_the_validation_split_names_and_protocols_say_so(dataset, encoder, name):
    other = replace(dataset, train=dataset.train, test=dataset.train)  # what evaluates on test alone would give the same
    object.__setattr__(other, "val", dataset.test)
    encoder.classifier = nn.Linear(16, 3)
    expected = evaluators.build(name)(encoder, dataset)
    scores = evaluators.build(name)(encoder, other, split="val")
    assert scores == {f"val_{key}": value for key, value in expected.items()}
    assert set(scores.figures) == {f"val_{key}" for key in expected.figures}
    assert {protocol.split for protocol in scores.protocols.values()} == {"val"}
    assert {protocol.samples for protocol in scores.protocols.values()} == {45}


@pytest.mark.parametrize("name", ALL)
def test_every_score_says_what_kind_it_is(dataset, encoder, name):
    kinds = {(protocol.kind, protocol.direction) for protocol in evaluators.build(name)(encoder, dataset).protocols.values()}
    assert kinds == {("score" if name == "silhouette" else "proportion", "max")}


@pytest.mark.parametrize("name", ALL)
def test_images_without_a_label_are_refused_before_anything_is_encoded(dataset, name):
    def never(images):
        raise AssertionError

    masked = dataset.test.mask_labels(0.4)
    for part in {"test"} if name == "silhouette" else {"train", "test"}:
        hidden = replace(dataset, **{part: masked})
        for act in (evaluators.build(name).check, lambda data: evaluators.build(name)(never, data)):
            with pytest.raises(UsageError, match=f"{name} needs labels, but 27 of 45 {part} images of shades have none; give"):
                act(hidden)


@pytest.mark.parametrize("name", ALL)
def test_a_dataset_without_labels_is_refused_with_what_measures_it(dataset, name):
    bare = {part: replace(getattr(dataset, part), labels=torch.full((len(getattr(dataset, part)),), -1)) for part in ("train", "test")}
    message = f"{name} needs labels, and the {'test' if name == 'silhouette' else 'train'} images of shades have none; "
    message += "use an evaluator without labels, such as 'rankme', or 'transfer' to a labelled dataset"
    with pytest.raises(UsageError, match=message):
        evaluators.build(name).check(replace(dataset, **bare))


def test_another_split_and_an_empty_one_are_refused(dataset, encoder):
    with pytest.raises(UsageError, match="split is 'valid'; did you mean 'val'. expected 'train', 'val', 'test'"):
        evaluators.build("knn")(encoder, dataset, split="valid")
    empty = replace(dataset, test=dataset.test.subset(torch.arange(0)))
    with pytest.raises(UsageError, match="the test split of shades holds no images; choose another split to evaluate on"):
        evaluators.build("silhouette")(encoder, empty)


def test_what_cannot_be_measured_says_so(dataset, encoder):
    def broken(images: Tensor) -> Tensor:
        return images.flatten(2) * float("nan")

    with pytest.raises(VitkitError, match="features are not finite: it has diverged"):
        extract_features(broken, dataset.test)
    with pytest.raises(UsageError, match="the split to evaluate on holds no images"):
        extract_features(encoder, dataset.test.subset(torch.arange(0)))
    assert extract_features(encoder, dataset.train.mask_labels(0.5)).labels.min() == -1
    with pytest.raises(UsageError, match=r"Flatten gave \(45, 16\) for 45 images; expected tokens \(45, n, d\)"):
        extract_features(nn.Flatten(), dataset.test)


@pytest.mark.parametrize("name", NAMES)
def test_classes_that_cannot_be_told_apart_say_so(shades, encoder, name):
    def made(labels: Tensor, classes: list[str]):
        tensors = {f"{split}.images": torch.zeros(30, 1, 4, 4, dtype=torch.uint8) for split in ("train", "test")}
        return from_store(Stored("some", classes, tensors | {"train.labels": labels, "test.labels": labels}))

    with pytest.raises(UsageError, match="needs training images of at least two classes"):
        evaluators.build(name)(encoder, made(torch.zeros(30, dtype=torch.int64), ["only"]))
    with pytest.raises(UsageError, match="a label is 29, but there are 2 classes: labels count from 0"):
        evaluators.build(name)(encoder, made(torch.arange(30), ["a", "b"]))


class Pixels(nn.Module):
    """Refuses an empty batch, as many a network does."""

    def encode_image(self, images: Tensor) -> Tensor:
        assert len(images) > 0
        return images.flatten(1) @ torch.linspace(-1, 1, 48).view(16, 3)


def _measure(dataset):
    found = extract_features(Pixels(), dataset.test, batch_size=11)
    return found.features, found.labels, [dict(evaluators.build(name)(Pixels(), dataset)) for name in ALL]


def _worker(number: int, folder: str, dataset) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.save(_measure(dataset), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_count_every_image_once_and_give_the_scores_of_one(shades, tmp_path: Path):
    dataset = shades(test=45)  # in twos of 11: twice whole, and one image, so that one process has none
    features, labels, scores = _measure(dataset)
    mp.spawn(_worker, (str(tmp_path), dataset), nprocs=2)
    for number in range(2):
        others = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(others[0], features)
        assert torch.equal(others[1], labels)
        assert others[2] == scores
