"""Exported models: the same numbers at any batch size, from a file that explains itself."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import vitkit
from vitkit import backbones, heads
from vitkit.errors import UsageError, VitkitError
from vitkit.models import export
from vitkit.models.saving import save

PREPARE = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "resize"}


class Drifting(nn.Module):
    """Another answer in the export than here."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 4

    def encode_image(self, images):
        return images.flatten(1)[:, :4] + float(torch.compiler.is_exporting())


class Branching(Drifting):
    """A path that depends on values, which no graph can hold."""

    def encode_image(self, images):
        return images.flatten(1)[:, :4] if float(images.sum()) > 0 else images.flatten(1)[:, 4:8]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "_added", {})
    for name, factory in {"drifting": Drifting, "branching": Branching}.items():
        backbones.add(name, factory)

    def make(name="vit", preprocessing=PREPARE, **modules):
        torch.manual_seed(0)
        options = {"img_size": 8, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2, "pool": "cls"}
        modules["backbone"] = backbones.build(name, **options if name == "vit" else {})
        save(tmp_path / "model", modules, preprocessing=preprocessing, classes=["a", "b", "c"], arguments={})
        return vitkit.load(tmp_path / "model")

    return make


@pytest.fixture
def model(saved):
    return saved(
        classifier=heads.build("linear", in_dim=8, out_dim=3),
        projector=heads.build("mlp", in_dim=8, out_dim=5, norm="batch"),
    )


def expected_of(model, images):
    """The saved model's own numbers, by its fast path."""
    with torch.no_grad():
        features = model.encode_image(model.preprocess(images))
        return features, model.projector(features), model.classifier(features).softmax(1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_onnx_gives_the_same_numbers_and_says_what_its_images_are(model, tmp_path, count):
    done = model.export(tmp_path / "model.onnx")
    assert done.outputs == {"features": 8, "embedding": 5, "probabilities": 3}
    assert done.difference < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.onnx"]
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy().astype(np.float32) / 255})
    for own, other in zip(expected_of(model, images), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(other), own, rtol=1e-5, atol=1e-5)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert metadata == {"classes": ["a", "b", "c"], "preprocessing": PREPARE}


def test_torch_export_gives_the_same_numbers(model, tmp_path):
    done = model.export(tmp_path / "model.pt2")
    assert done.difference < 1e-5
    extra = {"classes.json": "", "preprocessing.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["classes.json"]) == ["a", "b", "c"]
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    found = program.module()(images / 255)
    for own, other in zip(expected_of(model, images), found.values(), strict=True):
        torch.testing.assert_close(other, own, rtol=1e-5, atol=1e-5)


def test_numbers_that_differ_are_refused_and_nothing_is_written(saved, tmp_path):
    with pytest.raises(VitkitError, match="the exported model's features differ from the saved one's by .* nothing was"):
        saved("drifting").export(tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_no_graph_can_hold(saved, tmp_path):
    with pytest.raises(VitkitError, match="this model cannot be exported to a torch program: "):
        saved("branching").export(tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_refused(model, saved, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"cannot export to .*model.h5: expected a name that ends with .onnx \(onnx\)"):
        model.export(tmp_path / "model.h5")
    with pytest.raises(UsageError, match="expected a name that ends with"):
        export.export(model, tmp_path / "model.onnx", format="torch-export")
    (tmp_path / "model.pt2").write_bytes(b"")
    with pytest.raises(UsageError, match="exists already; choose another name, or give --overwrite"):
        model.export(tmp_path / "model.pt2")
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_runtime"))
    with pytest.raises(UsageError, match=r"needs no_such_runtime: pip install 'vitkit\[export\]'"):
        model.export(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="saved without preprocessing, so the size of its images is unknown"):
        saved(preprocessing={}).export(tmp_path / "other.pt2")
