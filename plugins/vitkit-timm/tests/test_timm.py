"""timm's models as backbones: tokens, pooled features, names, weights that can be had and that cannot."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

import vitkit
from vitkit import backbones, datasets
from vitkit.errors import CheckpointError, UnknownNameError, UsageError, VitkitError
from vitkit.models import save
from vitkit.registry import Spec
from vitkit_timm import TimmBackbone, prepared

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.vitkit("vitkit-timm")
def test_contract_of_a_transformer(vitkit_check):
    vitkit_check()


@pytest.mark.vitkit("timm/test_resnet", img_size=64)
def test_contract_of_a_convolutional_network(vitkit_check):
    vitkit_check()


@pytest.mark.parametrize(
    ("model", "side", "tokens"),
    [
        ("test_vit", 160, 101),
        ("test_vit4", 160, 101),
        ("test_resnet", 64, 4),
        ("test_convnext", 64, 4),
        ("test_efficientnet", 64, 4),
        ("test_nfnet", 64, 4),
        ("test_mambaout", 64, 4),
        ("swinv2_cr_tiny_ns_224", 64, 4),
        ("mobilenetv3_small_050", 64, 4),
        ("mixer_s32_224", 64, 4),
    ],
)
def test_tokens_and_pooled_features(model, side, tokens):
    backbone = backbones.build(f"timm/{model}", img_size=side).eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found, pooled = backbone(x), backbone.encode_image(x)
    assert found.shape == (2, tokens, backbone.embed_dim)
    assert pooled.shape == (2, backbone.embed_dim)


def test_the_rows_of_a_feature_map_come_in_order():
    backbone = TimmBackbone("test_resnet").eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = backbone.model.forward_features(x)
        assert torch.equal(backbone(x)[0, 4], features[0, :, 1, 1])  # a map of 2×3


def test_a_name_of_the_family_and_the_argument_build_the_same():
    torch.manual_seed(0)
    first = backbones.build("timm/test_vit", img_size=32, in_chans=1)
    torch.manual_seed(0)
    second = backbones.build("timm", model="test_vit", img_size=32, in_chans=1)
    assert first.spec == Spec("backbone", "timm/test_vit", "vitkit-timm", {"img_size": 32, "in_chans": 1})
    assert second.spec == Spec("backbone", "timm", "vitkit-timm", {"model": "test_vit", "img_size": 32, "in_chans": 1})
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(first.eval()(x), second.eval()(x))
    again = Spec.from_json(json.loads(json.dumps(first.spec.to_json()))).build()
    assert again.state_dict().keys() == first.state_dict().keys()


def test_it_is_listed_as_a_family_and_shown_by_any_of_its_names():
    assert {"timm", "timm/*"} <= set(backbones.names())
    assert "timm/resnet18" in backbones
    assert backbones.entry("timm/resnet18").summary.startswith("Any model of timm")


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: backbones.build("timm/resnet19"), UnknownNameError, r"has no model named 'resnet19'; did you mean .*'resnet18'"),
        (lambda: backbones.build("timm", model="vit"), UnknownNameError, r"timm.list_models\('\*vit\*'\)"),
        (lambda: backbones.build("timm"), UsageError, "needs the argument 'model'"),
        (lambda: backbones.build("timm/test_vit", pretrained="yes"), UsageError, "pretrained is 'yes', expected bool"),
        (lambda: backbones.build("timm/test_vit", wide=3), UsageError, "timm cannot build 'test_vit': .*'wide'"),
        (lambda: backbones.build("timm/test_vit.nobody"), UsageError, "timm cannot build 'test_vit.nobody'"),
        (lambda: TimmBackbone("test_vit")(torch.zeros(1, 1, 160, 160)), UsageError, "build the backbone with their in_chans"),
        (lambda: TimmBackbone("mixer_s32_224")(torch.zeros(1, 3, 32, 32)), UsageError, "built for 224×224 pixels, img_size builds"),
        (lambda: prepared(datasets.build("digits"), TimmBackbone("test_resnet")), UsageError, "digits has 1 channels"),
    ],
)
def test_mistakes_are_answered(build, error, text):
    with pytest.raises(error, match=text):
        build()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A Hub cache without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_weights_that_are_not_available_say_what_to_do(cache):
    with pytest.raises(VitkitError, match=r"weights of timm's 'test_vit' are not available.*`hf download timm/test_vit`"):
        backbones.build("timm/test_vit", pretrained=True)


def test_pretrained_weights_are_loaded_once_and_saved_with_the_model(cache, tmp_path):
    published = timm.create_model("test_vit", pretrained=False)
    repository = cache / f"models--{published.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    save_file(published.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    backbone = backbones.build("timm/test_vit", pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(backbone(x), published.eval().forward_features(x))
    assert backbone.spec.kwargs == {}
    save(tmp_path / "saved", {"backbone": backbone}, preprocessing={}, classes=[], arguments={})
    for file in (repository / "snapshots" / "abc").iterdir():
        file.unlink()
    assert torch.equal(vitkit.load(tmp_path / "saved").backbone(x), backbone(x))


READING = ["regnetx_002", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_lite0", "xcit_nano_12_p16_224"]


@pytest.mark.parametrize("model", READING)
def test_models_that_read_values_while_they_are_built_are_saved_and_loaded(tmp_path, model):
    backbone = backbones.build(f"timm/{model}", in_chans=1).eval()
    save(tmp_path, {"backbone": backbone}, preprocessing={}, classes=[], arguments={})
    loaded = vitkit.load(tmp_path).backbone
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pretrained": True}, "pretrained is True; a saved model must not name weights, files or addresses"),
        ({"checkpoint_path": "x.pth"}, "checkpoint_path is 'x.pth'; a saved model must not name"),
        ({"pretrained_cfg": {"url": "http://x"}}, "pretrained_cfg is .*; a saved model must not name"),
        ({"cache_dir": "/tmp"}, "cache_dir is '/tmp'; a saved model must not name"),
        ({"global_pool": "../x"}, "global_pool is '../x'; a saved model gives a component only its architecture"),
        ({"block_args": {"path": 1}}, "block_args is .*; expected numbers, flags, lists of these"),
    ],
)
def test_a_saved_model_sets_only_numbers_flags_and_names_of_layers(tmp_path, kwargs, message):
    build = {"global_pool": "avg", "act_layer": "relu", "depth": 1, "qkv_bias": False, "drop_path_rate": 0.1, "img_size": 32}
    save(tmp_path, {"backbone": backbones.build("timm/test_vit", **build)}, preprocessing={}, classes=[], arguments={})
    vitkit.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["modules"]["backbone"]["kwargs"] |= kwargs
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        vitkit.load(tmp_path)


def test_a_spec_never_names_weights():
    backbone = TimmBackbone("test_vit")
    given = {"pretrained": True, "pretrained_cfg": {}, "cache_dir": "x", "depth": 1}
    backbone.spec = Spec("backbone", "timm/test_vit", "vitkit-timm", given)
    assert backbone.spec.kwargs == {"depth": 1}


def test_images_are_prepared_as_the_weights_expect():
    backbone = TimmBackbone("test_vit", img_size=32, in_chans=1)
    data = prepared(datasets.build("digits"), backbone)
    assert data.shape == data.val.preprocessing.shape == data.test.preprocessing.shape == (1, 32, 32)
    assert data.mean == (pytest.approx(sum(backbone.model.pretrained_cfg["mean"]) / 3),)
    assert TimmBackbone("test_vit").preprocessing.mean == tuple(backbone.model.pretrained_cfg["mean"])


def test_the_readmes_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["tokens"].shape) == (2, 5, 192)
    assert tuple(names["features"].shape) == (2, 192)
