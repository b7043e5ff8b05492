"""Saved models: rebuilt from names, loaded strictly, and everything else refused with a reason."""

import hashlib
import json
import pickle
import sys
import threading
import warnings
from functools import wraps
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

import vitkit
from vitkit import backbones, heads
from vitkit.errors import CheckpointError, MissingPluginError, UsageError
from vitkit.models.features import encode_image
from vitkit.models.saving import VersionWarning, load, save
from vitkit_vit import MLPHead, ViT

HEAD = '''
from torch import nn

class Wide(nn.Module):
    """A wide head."""
    def __init__(self, in_dim: int, out_dim: int = 3):
        super().__init__()
        self.fc = nn.Linear(in_dim, out_dim)
    def forward(self, x):
        return self.fc(x)
'''
PREPARE = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "pad"}


@pytest.fixture
def modules():
    return {
        "backbone": backbones.build("vit", img_size=8, in_chans=1, embed_dim=8, depth=1, num_heads=2),
        "projector": heads.build("mlp", in_dim=8, out_dim=4),
    }


@pytest.fixture
def saved(tmp_path, modules):
    directory = tmp_path / "model"
    save(directory, modules, preprocessing=PREPARE, classes=["a", "b"], arguments={"lr": 0.1})
    return directory


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def change(directory, **values):
    (directory / "config.json").write_text(json.dumps({**config_of(directory), **values}))


def test_what_was_saved_comes_back_bit_for_bit(saved, modules):
    model = vitkit.load(saved)
    assert not model.training
    for name, module in modules.items():
        own = getattr(model, name).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in module.state_dict().items())
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    expected = modules["backbone"].eval().encode_image((images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(model.encode_image(model.preprocess(images)), expected)
    assert model.classes == ["a", "b"]
    assert config_of(saved)["modules"]["backbone"]["kwargs"]["depth"] == 1
    assert config_of(saved)["modules"]["backbone"]["version"] == vitkit.__version__


def test_pictures_are_prepared_as_the_training_images_were(saved):
    model = load(saved)
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    pictures = [Image.fromarray(image.squeeze(0).numpy()) for image in images]
    torch.testing.assert_close(model.preprocess(pictures), model.preprocess(images))
    with pytest.raises(UsageError, match=r"images are torch.uint8 \(2, 2, 8, 8\); expected uint8 \(n, 1, h, w\)"):
        model.preprocess(torch.zeros(2, 2, 8, 8, dtype=torch.uint8))


def test_a_module_that_no_registry_built_cannot_be_saved(tmp_path):
    with pytest.raises(UsageError, match=r"module 'head' \(Linear\) was not built by a registry"):
        save(tmp_path, {"head": torch.nn.Linear(2, 2)}, preprocessing={}, classes=[], arguments={})
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_missing(tmp_path, saved):
    with pytest.raises(CheckpointError, match="no such directory; give a directory that a run saved into"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no config.json"):
        load(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read .*model.safetensors: No such file"):
        load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1, 2]", "is no vitkit config"),
        ('{"library": "other"}', "is no vitkit config"),
        (b"\xff\xfe{}", "is no JSON: 'utf-8' codec can't decode"),
        (json.dumps({"library": "vitkit", "format": 99}), "has format 99, this vitkit reads 1; pip install --upgrade"),
        (json.dumps({"library": "vitkit", "format": 1}), "'modules' should be a dict, is None"),
        (json.dumps({"library": "vitkit", "format": "1"}), "has format '1', this vitkit reads 1"),
        (" " * (32 * 2**20 + 1), "has 33,554,433 bytes; a vitkit config has at most 33,554,432"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_configs_that_are_none(saved, text, message):
    (saved / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        load(saved)


@pytest.mark.parametrize("depth", [40, 500, 100_000])
def test_a_config_nested_too_deeply_is_refused(saved, depth):
    text = json.dumps({**config_of(saved), "arguments": "HERE"}).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="is nested (more than 32 levels deep|too deeply to be read)"):
        load(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": [1, 2]}, r"'classes' should be a list of names, is \[1, 2\]"),
        ({"weights": 3}, "'weights' should be a dict, is 3"),
        ({"preprocessing": {**PREPARE, "mean": [0.5, 0.5]}}, "preprocessing is .*; expected shape, mean, std and fit"),
        ({"preprocessing": {**PREPARE, "shape": [1, 8, float("inf")]}}, "config.json: "),
    ],
)
def test_configs_with_a_field_that_is_something_else(saved, values, message):
    change(saved, **values)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_weights_that_are_cut_short_changed_or_something_else(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, its config says \d+: cut short or foreign"):
        load(saved)
    changed = bytearray(whole)
    changed[-3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"its SHA-256 differs from the one in config\.json"):
        load(saved)
    for foreign in (pickle.dumps({"a": 1}), (2**60).to_bytes(8, "little") + b"{}"):
        path.write_bytes(foreign)
        weights = config_of(saved)["weights"]
        change(saved, weights={**weights, "bytes": len(foreign)})
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            load(saved)


def replace_weights(saved, tensors):
    body = to_bytes(tensors)
    (saved / "model.safetensors").write_bytes(body)
    change(saved, weights={"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()})


def test_weights_that_do_not_fit(saved):
    tensors = load_file(saved / "model.safetensors")
    key = "projector.layers.0.weight"
    replace_weights(saved, {name: value for name, value in tensors.items() if name != key} | {"x.y": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"lacks {key}; does not belong: x.y"):
        load(saved)
    replace_weights(saved, tensors | {key: torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=rf"{key} has the shape \(3, 3\), its config builds \(8, 8\)"):
        load(saved)
    replace_weights(saved, tensors | {key: tensors[key].double()})
    with pytest.raises(CheckpointError, match=f"{key} is torch.float64, its config builds torch.float32"):
        load(saved)


def test_only_registered_names_are_built(saved):
    modules = config_of(saved)["modules"]
    for spec, message in (
        ({**modules["projector"], "name": "os.system"}, "no head named 'os.system'"),
        (
            {**modules["projector"], "kind": "module"},
            "of kind 'module'; a saved model is built from backbone, head, loss",
        ),
        ({**modules["projector"], "kwargs": {"in_dim": 8, "out_dim": 4, "evil": 1}}, "takes no argument 'evil'"),
        ({**modules["projector"], "kwargs": {"in_dim": "8", "out_dim": 4}}, "in_dim is '8', expected int"),
        ({"kind": "head"}, "a Spec's 'name' is a str"),
        ({**modules["projector"], "kind": "dataset", "name": "digits", "kwargs": {}}, "of kind 'dataset'"),
    ):
        change(saved, modules={**modules, "projector": spec})
        with pytest.raises(CheckpointError, match=message):
            load(saved)


def with_kwargs(saved, module, **kwargs):
    """Change arguments of a saved module."""
    modules = config_of(saved)["modules"]
    change(saved, modules={**modules, module: {**modules[module], "kwargs": {**modules[module]["kwargs"], **kwargs}}})


@pytest.mark.parametrize("kwargs", [{"in_dim": 20_000}, {"hidden": 2**20, "depth": 3}, {"in_dim": 2**20, "out_dim": 2**20}], ids=str)
def test_a_config_that_would_build_far_more_than_was_saved_is_refused(saved, kwargs):
    with_kwargs(saved, "projector", **kwargs)
    with pytest.raises(CheckpointError, match="'projector' cannot be built: it takes more than .* bytes, far beyond"):
        load(saved)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("projector", "out_dim", 10**12),
        ("projector", "in_dim", 2**62),
        ("projector", "depth", 4 * 10**8),
        ("backbone", "embed_dim", 10**12 + 1),
        ("backbone", "num_heads", 10**9),
        ("backbone", "img_size", [2**40, 2**40]),
        ("backbone", "depth", 10**30),
        ("backbone", "registers", -(2**40)),
        ("backbone", "mlp_ratio", 1e300),
        ("backbone", "mlp_ratio", float("inf")),
        ("backbone", "dropout", float("nan")),
    ],
)
def test_a_number_beyond_every_saved_size_is_refused_before_its_component_is_called(saved, monkeypatch, module, name, value):
    for component in (ViT, MLPHead):
        monkeypatch.setattr(component, "__init__", wraps(component.__init__)(lambda *a, **k: pytest.fail("built")))
    with_kwargs(saved, module, **{name: value})
    if module == "projector":
        change(saved, modules={"projector": config_of(saved)["modules"]["projector"]})
    with pytest.raises(CheckpointError, match=rf"{name} is .*; expected a finite number of at most 1,048,576"):
        load(saved)


def test_blocks_without_end_are_refused(saved):
    with_kwargs(saved, "backbone", depth=2**20)
    with pytest.raises(CheckpointError, match="it makes more than .* tensors, far beyond the weights that were saved"):
        load(saved)


def test_lists_names_modules_and_shapes_without_end_are_refused(saved):
    config = config_of(saved)
    with_kwargs(saved, "backbone", img_size=[8] * (2**20 + 1))
    with pytest.raises(CheckpointError, match="img_size is .*, expected|hold more than 1,048,576 values"):
        load(saved)
    modules = config["modules"]
    for changed, message in (
        ({"modules": {f"m{i}": modules["projector"] for i in range(65)}}, "has 65 modules; a saved model has at most 64"),
        ({"modules": {"m" * 65: modules["projector"]}}, "has a name that no attribute of a model can have"),
        ({"modules": {"a": {**modules["projector"], "name": "x" * 201}}}, "a Spec's 'name' has at most 200 characters"),
        ({"modules": {"a": {**modules["projector"], "distribution": "x; rm -rf ~"}}}, "is the name of a Python package"),
        ({"preprocessing": {**PREPARE, "shape": [1, 10**9, 10**9]}}, r"shape \(1, 1e\+09, 1e\+09\); expected 1 to 16,384"),
        ({"arguments": {"a": [0] * (2**21 + 1)}}, "holds more than 2,097,152 values; no vitkit config does"),
    ):
        change(saved, **{**config, **changed})
        with pytest.raises(CheckpointError, match=message):
            load(saved)


def test_a_model_is_loaded_while_another_thread_builds_modules(saved):
    stop = threading.Event()
    failures: list[BaseException] = []

    def build_without_end():
        try:
            while not stop.is_set():
                backbones.build("vit", img_size=8, in_chans=1, embed_dim=8, depth=40, num_heads=2)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=build_without_end)
    thread.start()
    try:
        for _ in range(20):
            load(saved)
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_the_weights_are_read_once_and_never_as_a_whole(saved, monkeypatch):
    read, digested = [], []
    read_bytes, digest = Path.read_bytes, hashlib.file_digest
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    monkeypatch.setattr("hashlib.file_digest", lambda file, name: digested.append(file.name) or digest(file, name))
    load(saved)
    assert read == ["config.json"]
    assert digested == [str(saved / "model.safetensors")]


def test_a_missing_plugin_is_named_with_the_command_that_mends_it(tmp_path, install, monkeypatch):
    site = install("wide-heads", "1.2", {"heads": {"wide": "wide_heads:Wide"}}, wide_heads=HEAD)
    save(tmp_path / "m", {"head": heads.build("wide", in_dim=2)}, preprocessing={}, classes=[], arguments={})
    assert load(tmp_path / "m").head.spec.distribution == "wide-heads"
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != str(site)])
    with pytest.raises(
        MissingPluginError, match=r"of wide-heads 1.2, which is not installed: pip install 'wide-heads==1.2'"
    ):
        load(tmp_path / "m")


def test_another_version_of_a_plugin_is_said_and_blamed_where_it_no_longer_fits(tmp_path, install):
    install("wide-heads", "1.2", {"heads": {"wide": "wide_heads:Wide"}}, wide_heads=HEAD)
    directory = tmp_path / "m"
    save(directory, {"head": heads.build("wide", in_dim=2)}, preprocessing={}, classes=[], arguments={})
    spec = config_of(directory)["modules"]["head"]
    change(directory, modules={"head": {**spec, "version": "1.1"}})
    with pytest.warns(VersionWarning, match=r"saved with wide-heads 1.1, installed is 1.2"):
        load(directory)
    change(directory, modules={"head": {**spec, "version": "2.0", "kwargs": {"in_dim": 2, "deep": True}}})
    with (
        warnings.catch_warnings(),
        pytest.raises(CheckpointError, match=r"takes no argument 'deep'.*pip install 'wide-heads==2.0'"),
    ):
        warnings.simplefilter("ignore", VersionWarning)
        load(directory)


def test_saving_again_replaces_and_a_config_beside_other_weights_is_noticed(saved, modules, tmp_path):
    old = (saved / "config.json").read_text()
    with torch.no_grad():
        modules["projector"].layers[0].weight.add_(1)
    save(saved, modules, preprocessing=PREPARE, classes=["a", "b"], arguments={})
    load(saved)
    (saved / "config.json").write_text(old)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load(saved)


def test_a_directory_holds_two_files_and_what_is_saved_beside_them_changes_no_field(tmp_path, modules):
    extra = {"recipe": "mine", "format": 7, "modules": {}}
    save(tmp_path / "m", modules, preprocessing=PREPARE, classes=["a"], arguments={}, extra=extra)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert config_of(tmp_path / "m")["recipe"] == "mine"
    assert load(tmp_path / "m").classes == ["a"]


def test_what_cannot_be_saved_leaves_the_older_model_as_it_was(saved, modules):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for changed, arguments, message in (
        (modules, {"path": saved}, "config holds plain JSON values only: Object of type PosixPath"),
        ({"classes": modules["backbone"]}, {}, "a name that can be an attribute of the model; given 'classes'"),
        ({"class": modules["backbone"]}, {}, "given 'class'"),
        ({"a.b": modules["backbone"]}, {}, "given 'a.b'"),
    ):
        with pytest.raises(UsageError, match=message):
            save(saved, changed, preprocessing=PREPARE, classes=["a"], arguments=arguments)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    load(saved)


@pytest.mark.parametrize("name", ["train", "config", "class", "a b", "__class__", ""])
def test_a_config_with_a_module_of_an_impossible_name_is_refused(saved, name):
    change(saved, modules={name: config_of(saved)["modules"]["backbone"]})
    with pytest.raises(CheckpointError, match=f"module {name!r} has a name that no attribute of a model can have"):
        load(saved)


def test_a_file_in_place_of_a_directory_and_a_directory_in_place_of_a_file(saved):
    with pytest.raises(CheckpointError, match=r"no model at .*config\.json: that is a file; give a directory"):
        load(saved / "config.json")
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: Is a directory"):
        load(saved)


def test_tied_weights_stay_tied(tmp_path, monkeypatch):
    class Tied(nn.Module):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)
            self.out.weight = self.into.weight
            self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)  # not contiguous

    monkeypatch.setattr(heads, "_added", {})
    heads.add("tied", Tied)
    head = heads.build("tied")
    save(tmp_path, {"head": head}, preprocessing={}, classes=[], arguments={})
    again = load(tmp_path).head
    assert again.out.weight is again.into.weight
    assert torch.equal(again.into.weight, head.into.weight)
    assert torch.equal(again.turned, head.turned)


def test_what_was_added_by_hand_must_be_added_again(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "_added", {})
    heads.add("mine", nn.Identity)
    save(tmp_path, {"head": heads.build("mine")}, preprocessing={}, classes=[], arguments={})
    load(tmp_path)
    monkeypatch.setattr(heads, "_added", {})
    with pytest.raises(
        MissingPluginError, match=r"added by hand as the head 'mine': call .*REGISTRIES\['head'\]\.add\('mine', "
    ):
        load(tmp_path)


def test_loading_leaves_the_random_state(saved):
    state = torch.get_rng_state()
    load(saved)
    assert torch.equal(state, torch.get_rng_state())


def test_no_dataset_or_evaluator_is_built_nor_its_plugin_imported(saved, install):
    install("traps", "1.0", {"datasets": {"trap": "traps:Trap"}}, traps="raise SystemExit(3)")
    modules = config_of(saved)["modules"]
    trap = {"kind": "dataset", "name": "trap", "distribution": "traps", "version": "1.0", "kwargs": {}}
    change(saved, modules={**modules, "projector": trap})
    with pytest.raises(CheckpointError, match="of kind 'dataset'; a saved model is built from backbone, head, loss"):
        load(saved)
    assert "traps" not in sys.modules


FAULTS = """
from torch import nn

def broken(): raise ValueError("out of luck")
class Thing: pass
def thing(): return Thing()
def changed(): return nn.Linear(2, 4)
"""


def test_whatever_a_plugin_does_when_built_is_one_message_that_names_both_versions(tmp_path, install):
    points = {
        "heads": {"broken": "faults:broken", "thing": "faults:thing", "wide": "faults:changed", "gone": "no:where"}
    }
    install("faults", "1.3", points, faults=FAULTS)
    save(tmp_path, {"head": heads.build("wide")}, preprocessing={}, classes=[], arguments={})
    spec = config_of(tmp_path)["modules"]["head"]
    assert load(tmp_path).head.weight.shape == (4, 2)
    mend = r"; 'head' was saved with faults 1\.2, installed is 1\.3: pip install 'faults==1\.2'"
    for name, message in (
        ("broken", f"cannot be built: ValueError: out of luck{mend}"),
        ("thing", f"the head 'thing' is no torch module but a Thing{mend}"),
        ("gone", rf"cannot be built: PluginError: .* cannot be imported: ModuleNotFoundError.*{mend}"),
        ("lost", f"no head named 'lost' from 'faults'.*{mend}"),
    ):
        change(tmp_path, modules={"head": {**spec, "name": name, "version": "1.2"}})
        with pytest.warns(VersionWarning), pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    change(tmp_path, modules={"head": {**spec, "version": "1.2"}})
    replace_weights(tmp_path, {"head.weight": torch.zeros(3, 2), "head.bias": torch.zeros(4)})
    with (
        pytest.warns(VersionWarning),
        pytest.raises(CheckpointError, match=rf"\(3, 2\), its config builds \(4, 2\){mend}"),
    ):
        load(tmp_path)


def test_a_backbone_that_pools_itself_one_that_gives_tokens_and_others():
    class Pooling(nn.Module):
        def encode_image(self, images):
            return images.mean(dim=(2, 3))

    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(encode_image(Pooling(), images), images.mean(dim=(2, 3)))
    torch.testing.assert_close(encode_image(lambda x: x.flatten(2), images), images.flatten(2).mean(1))
    with pytest.raises(UsageError, match=r"Identity gave \(2, 3, 4, 4\) for 2 images; expected tokens \(2, n, d\)"):
        encode_image(nn.Identity(), images)
    with pytest.raises(UsageError, match="gave tuple for 2 images"):
        encode_image(lambda x: (x, x), images)


def test_without_a_backbone_or_preprocessing_a_model_says_so(tmp_path, modules):
    save(tmp_path, {"projector": modules["projector"]}, preprocessing={}, classes=[], arguments={})
    model = load(tmp_path)
    with pytest.raises(UsageError, match="saved without a module named 'backbone'"):
        model.encode_image(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match="saved without preprocessing; normalise images as its training did"):
        model.preprocess(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
