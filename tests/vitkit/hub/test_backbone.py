"""A backbone to start from: a saved model, a registered name, a file of weights; nothing else, and nothing in silence."""

import pytest
import torch
from safetensors.torch import save_file

from vitkit import backbones, heads
from vitkit.errors import UsageError
from vitkit.hub import open_backbone
from vitkit.models.saving import save

SMALL = {"img_size": 8, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}
PREPARE = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "resize"}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    modules = {"backbone": backbones.build("vit", **SMALL), "projector": heads.build("mlp", in_dim=8, out_dim=4)}
    save(tmp_path / "run", modules, preprocessing=PREPARE, classes=["cat", "dog"], arguments={})
    return tmp_path / "run", modules["backbone"].eval()


def test_a_saved_model_brings_its_weights_preprocessing_and_classes(saved):
    directory, backbone = saved
    opened = open_backbone(directory)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(opened.backbone(x), backbone(x))
    assert opened.backbone.spec == backbone.spec
    assert opened.preprocessing.to_json() == PREPARE
    assert opened.classes == ["cat", "dog"]
    assert opened.origin == f"the saved model {directory}"


def test_a_registered_backbone_with_random_weights_or_those_of_a_file(saved, tmp_path):
    _, backbone = saved
    opened = open_backbone("vit", weights="none", **SMALL)
    assert opened.origin == "random weights of vit"
    assert opened.preprocessing is None
    assert not opened.backbone.training
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    loaded = open_backbone("vit", weights=tmp_path / "weights.safetensors", **SMALL)
    assert torch.equal(loaded.backbone.cls_token, backbone.cls_token)
    assert loaded.origin == f"{tmp_path / 'weights.safetensors'}: {len(backbone.state_dict())} tensors of vit loaded"
    assert loaded.backbone.spec.kwargs == SMALL


def test_published_weights_are_asked_for(monkeypatch):
    asked = []

    class Published(torch.nn.Module):
        def __init__(self, img_size: int = 8, pretrained: bool = False) -> None:
            super().__init__()
            asked.append((img_size, pretrained))

    monkeypatch.setattr(backbones, "_added", {})
    backbones.add("published", Published)
    assert open_backbone("published", img_size=16).origin == "the published weights of published"
    open_backbone("published", weights="none")
    assert asked == [(16, True), (8, False)]


def test_a_directory_comes_before_a_registered_name(saved, monkeypatch, tmp_path):
    saved[0].rename(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    assert open_backbone("vit").origin == "the saved model vit"


@pytest.mark.parametrize(
    ("source", "arguments", "text"),
    [
        (" ", {}, "the model is empty; give a directory that a run saved into, or a registered backbone"),
        ("runs", {}, "no model at runs: it is neither a directory, nor a registered backbone; registered: "),
        ("vitt", {}, r"nor a registered backbone; did you mean 'vit'\?"),
        ("vit", {}, "vit has no published weights; give --weights FILE, or --weights none for random weights"),
        ("vit", {"weights": "nofile"}, "--weights nofile: no such file; expected auto, none, or a file of weights"),
        ("RUN", {"img_size": 32}, "run is a saved model: it has its own size and weights; leave img_size=32 out"),
        ("RUN", {"weights": "none"}, "leave weights=none out"),
        ("HEADS", {}, "was saved without a module named 'backbone'; it has classifier"),
    ],
)
def test_other_sources_are_refused(source, arguments, text, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "heads", {"classifier": heads.build("linear", in_dim=8, out_dim=2)}, preprocessing={}, classes=[], arguments={})
    source = {"RUN": str(saved[0]), "HEADS": "heads"}.get(source, source)
    with pytest.raises(UsageError, match=text):
        open_backbone(source, **arguments)
