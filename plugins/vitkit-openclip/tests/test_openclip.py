"""open_clip's text towers as a backbone: its own features, texts that it cannot read, weights that can be had and that cannot."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch

import vitkit
from vitkit import backbones
from vitkit.errors import CheckpointError, UnknownNameError, UsageError, VitkitError
from vitkit.models import save
from vitkit_openclip import OpenCLIPText

README = Path(__file__).parent.parent / "README.md"
TEXTS = [
    "the photo on the left is a cat and the photo on the right is a maple tree",
    "a dog",
    "the photo on the left is 3 and the photo on the right is 5",
]
TINY = {
    "embed_dim": 24,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that open_clip knows, small enough for a test."""
    path = tmp_path_factory.mktemp("config") / "tiny-clip.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def weights(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.nn.Module]:
    """A checkpoint file of it, and the whole model that it is of."""
    torch.manual_seed(1)
    whole = open_clip.create_model(tiny)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(whole.state_dict(), path)
    return str(path), whole.eval()


@pytest.mark.vitkit("vitkit-openclip")
def test_contract(vitkit_check):
    vitkit_check()


def test_features_are_open_clips_own(tiny, weights):
    path, whole = weights
    text = backbones.build("openclip_text", model=tiny, pretrained=path)
    expected = whole.encode_text(open_clip.get_tokenizer(tiny)(TEXTS))  # padded to the whole context
    assert text.tokenize(TEXTS).shape[1] < 40
    torch.testing.assert_close(text.encode_text(TEXTS), expected)
    assert text.encode_text([]).shape == (0, 24)


def test_a_texts_feature_is_the_projected_token_at_its_end(tiny):
    text = OpenCLIPText(model=tiny, pretrained=None)
    ids = text.tokenize(TEXTS)
    tokens = text(ids)
    assert tokens.shape == (3, ids.shape[1], text.embed_dim)
    torch.testing.assert_close(tokens[torch.arange(3), ids.argmax(1)], text.encode_text(TEXTS))


def test_frozen_unless_told_otherwise(tiny):
    assert not any(p.requires_grad for p in OpenCLIPText(model=tiny, pretrained=None).parameters())
    assert all(p.requires_grad for p in OpenCLIPText(model=tiny, pretrained=None, frozen=False).parameters())


def test_a_saved_tower_holds_its_weights(tiny, weights, tmp_path):
    torch.manual_seed(2)
    text = backbones.build("openclip_text", model=tiny, pretrained=weights[0])
    assert text.spec.kwargs == {"model": tiny, "pretrained": None, "quick_gelu": False}
    save(tmp_path / "saved", {"text": text}, preprocessing={}, classes=[], arguments={})
    loaded = vitkit.load(tmp_path / "saved").text
    assert torch.equal(loaded.encode_text(TEXTS), text.encode_text(TEXTS))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_activation_of_the_weights_is_kept(tiny, weights):
    towers = [OpenCLIPText(model=tiny, pretrained=weights[0], quick_gelu=quick) for quick in (None, False, True)]
    plain, same, quick = (tower.encode_text(TEXTS) for tower in towers)
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, quick)
    again = backbones.build("openclip_text", model=tiny, pretrained=weights[0], quick_gelu=True).spec.build()
    again.load_state_dict(towers[2].state_dict())
    assert torch.equal(again.encode_text(TEXTS), quick)


@pytest.mark.slow
def test_the_readmes_example_builds_vit_b_32s_text_tower():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    text = found["text"]
    assert found["features"].shape == (1, 512)
    assert (text.embed_dim, text.context_length, text.vocab_size) == (512, 77, 49_408)
    assert sum(p.numel() for p in text.parameters()) == 63_428_096


def test_weights_that_are_not_available_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(VitkitError) as caught:
        backbones.build("openclip_text")
    said = str(caught.value)
    assert said.startswith("the weights 'openai' of 'ViT-B-32' are not available: ")
    assert "tried huggingface.co/timm/vit_base_patch32_clip_224.openai and its cache" in said
    assert "`hf download timm/vit_base_patch32_clip_224.openai`" in said
    assert said.endswith("The backbone 'text_transformer', trained from scratch, needs no weights")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a dog", " "], "the caption ' ' holds no word; give some text"),
        (
            ["dog " * 50],
            r"has 52 tokens, the two at its ends among them; this text encoder reads 40 at most: shorten it",
        ),
        ("a dog", "encode_text takes a list of texts; given one text, 'a dog'"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tiny, texts, message):
    with pytest.raises(UsageError, match=message):
        OpenCLIPText(model=tiny, pretrained=None).encode_text(texts)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"model": "ViT-B-33"}, UnknownNameError, "has no model named 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ({"pretrained": "opnai"}, UnknownNameError, "has no weights 'opnai' of 'ViT-B-32'; did you mean 'openai'"),
        (
            {"model": "ViT-B-16-SigLIP"},
            UsageError,
            "the text tower of 'ViT-B-16-SigLIP' is not CLIP's causal one, or its tokenizer",
        ),
        ({"text_cfg": {"layers": 1}}, UsageError, "text_cfg is {'layers': 1}, but pretrained='openai' fixes the tower"),
        (
            {"pretrained": None, "text_cfg": {"depth": 1}},
            UsageError,
            "open_clip cannot build 'ViT-B-32' with text_cfg=",
        ),
    ],
)
def test_what_open_clip_does_not_have_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        backbones.build("openclip_text", **arguments)


def test_ids_of_another_kind_are_refused(tiny):
    with pytest.raises(UsageError, match=r"ids are torch.float32 \(2, 3\); expected int64 \(texts, 1 to 40 tokens\)"):
        OpenCLIPText(model=tiny, pretrained=None)(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pretrained": "openai"}, "pretrained is 'openai'; a saved model must not name weights, files or addresses"),
        ({"pretrained": "/etc/passwd"}, "pretrained is '/etc/passwd'; a saved model must not name"),
        ({"model": "hf-hub:me/evil"}, "model is 'hf-hub:me/evil'; a saved model gives a component only its architecture"),
        ({"model": "local-dir:/tmp"}, "model is 'local-dir:/tmp'; a saved model gives"),
        ({"text_cfg": {"hf_model_name": "me/evil"}}, "its key 'hf_model_name' is not declared as architecture; expected context"),
        ({"text_cfg": {"layers": "me/evil"}}, "layers is 'me/evil', expected int"),
    ],
)
def test_a_saved_tower_names_no_weights_no_folder_and_no_repository(tmp_path, kwargs, message):
    small = {"pretrained": None, "text_cfg": {"layers": 1, "width": 32, "heads": 2}}
    save(tmp_path, {"text": backbones.build("openclip_text", **small)}, preprocessing={}, classes=[], arguments={})
    vitkit.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["modules"]["text"]["kwargs"] |= kwargs
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        vitkit.load(tmp_path)
