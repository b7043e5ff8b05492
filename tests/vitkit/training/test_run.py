"""The run that a recipe talks to: evaluating, and saving with the facts of the data that was trained on."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitkit
from vitkit import Run, Scores, backbones, heads, losses
from vitkit.contracts import Measurement
from vitkit.data import build
from vitkit.errors import UsageError
from vitkit.models import extract_features


class Classifier(nn.Module):
    def __init__(self, size=8, temperature=None):
        super().__init__()
        self.backbone = backbones.build("vit", img_size=size, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
        self.classifier = heads.build("linear", in_dim=8, out_dim=10)
        self.loss = losses.build("info_nce", temperature=0.1, learned=temperature == "learned")
        self.plain = nn.Linear(1, 1)
        self.batches = 0

    def encode_image(self, images):
        self.batches += 1
        return self.backbone(images).mean(1)

    def forward(self, batch):
        logits = self.classifier(self.encode_image(batch["images"]))
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]) + 0 * self.loss(logits, logits)["loss"]}


def fit(run, model, batches, epochs=1):
    return run.fit(model, batches, epochs=epochs, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def named(rows):
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", device="cpu", precision="fp32")
    yield run
    run.close()


def config(run):
    return json.loads((run.directory / "config.json").read_text())


@pytest.mark.parametrize(("temperature", "parts"), [(None, ["backbone", "classifier"]), ("learned", ["backbone", "classifier", "loss"])])
def test_save_finds_the_parts_that_a_registry_built_and_losses_that_learn(run, temperature, parts):
    data = build("digits").resized(8)
    model = Classifier(temperature=temperature)
    for _ in fit(run, model, data.train.stratified_subset(64).batches(32)):
        pass
    run.save(model)
    assert sorted(config(run)["modules"]) == parts
    loaded = vitkit.load(run.directory)
    saved = loaded.classifier.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.classifier.state_dict().items())


def test_save_takes_classes_and_preprocessing_from_the_data_that_was_trained_on(run):
    """However the dataset was built, and whatever other datasets the run has seen."""
    data = build("digits").resized(12)
    trained = data.train.stratified_subset(64)
    run.dataset("digits", default="digits")
    model = Classifier(size=12)
    for _ in fit(run, model, trained.mask_labels(1.0).batches(32)):
        pass
    run.save(model)
    assert config(run)["classes"] == data.classes
    assert config(run)["preprocessing"] == trained.preprocessing.to_json()


def test_save_without_facts_of_the_data_says_so_and_saves(run, capsys):
    images = TensorDataset(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    loader = DataLoader(images, batch_size=4, collate_fn=named)
    model = Classifier()
    for _ in fit(run, model, loader):
        pass
    run.save(model)
    assert "the batches name no classes or no preprocessing" in (run.directory / "log.txt").read_text()
    with pytest.raises(UsageError, match="this model was saved without preprocessing; normalise images as its training did"):
        vitkit.load(run.directory).preprocess(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_a_data_loader_names_the_classes_of_its_dataset(run):
    images = TensorDataset(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    images.classes = ["cat", "dog"]
    loader = DataLoader(images, batch_size=4, collate_fn=named)
    model = Classifier()
    for _ in fit(run, model, loader):
        pass
    run.save(model)
    assert config(run)["classes"] == ["cat", "dog"]


def test_a_model_without_registered_parts_is_refused(run):
    with pytest.raises(UsageError, match=r"no attribute of Linear was built by a registry; .* name the modules: run.save\(backbone=...\)"):
        run.save(nn.Linear(1, 1))


def test_evaluate_shares_features_uses_the_runs_precision_and_logs(tmp_path):
    run = Run(tmp_path / "run", device="cpu", precision="bf16")
    data = build("digits").resized(8)
    model, dtypes = Classifier(), []

    class Measure:
        def __init__(self, name):
            self.name = name

        def __call__(self, model, dataset, split="test"):
            extract_features(model, dataset.test)
            dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            scores = Scores({self.name: len(getattr(dataset, split, dataset.test))}, protocols={self.name: Measurement(split, 1)})
            return scores.prefixed("val_") if split == "val" else scores

    for epoch in fit(run, model, data.train.stratified_subset(64).batches(32)):
        model.batches = 0
        scores = epoch.evaluate(model, data, Measure("one"), Measure("two"))
        assert model.batches == 1
        validation = epoch.evaluate(model, SimpleNamespace(test=data.test, val=data.train), Measure("one"), split="val")
    run.close()
    assert dtypes == [torch.bfloat16] * 3
    assert scores == {"one": 382.0, "two": 382.0}
    assert validation == {"val_one": float(len(data.train))}
    assert validation.protocols["val_one"].split == "val"
    assert epoch.logged == {**scores, **validation}
