"""Weights of other libraries: the backbone computes what theirs computes, and nothing is skipped silently."""

import argparse
import re

import pytest
import torch
from safetensors.torch import save_file

import vitkit
from vitkit import backbones
from vitkit.errors import CheckpointError, UsageError
from vitkit.models import load_weights
from vitkit.models.weights import fit_channels, resample_patches, resample_positions

timm = pytest.importorskip("timm")
SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def timm_vit(**arguments):
    """A small ViT of timm with weights that are not symmetric."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**SIZE, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def ours(**arguments):
    return backbones.build("vit", dropout=0.0, **{**SIZE, "pool": "cls", **arguments}).eval()


def images(channels=3, size=16):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def hugging_face(state, *, prefix="vit."):
    """A state dict of timm under the names of Hugging Face's ViT."""
    named = {}
    for name, value in state.items():
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = name.replace("pos_embed", "embeddings.position_embeddings")
        name = re.sub("^cls_token", "embeddings.cls_token", re.sub(r"^blocks\.", "encoder.layer.", re.sub(r"^norm\.", "layernorm.", name)))
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after").replace("mlp.fc1", "intermediate.dense")
        name = name.replace("mlp.fc2", "output.dense").replace("attn.proj", "attention.output.dense")
        if "attn.qkv" in name:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            named |= {prefix + name.replace("attn.qkv", f"attention.attention.{part}"): rows.clone() for part, rows in parts}
        else:
            named["classifier." + name[5:] if name.startswith("head.") else prefix + name] = value
    return named


def chunked(state):
    """Under the names of DINOv2, whose blocks lie in chunks."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name).replace("reg_token", "register_tokens"): v for name, v in state.items()}


WRITERS = {
    "timm": lambda state: state,
    "dino": lambda state: {"teacher": {f"module.backbone.{n}": v for n, v in state.items()}, "student": {"x": torch.ones(1)}, "epoch": 3},
    "dinov2": chunked,
    "mae": lambda state: {"model": {**state, "mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}},
    "deit": lambda state: {"model": state},
    "hugging face": hugging_face,
    "hugging face, the bare model": lambda state: hugging_face(state, prefix=""),
}


def written(path, content):
    nested = any(not isinstance(value, torch.Tensor) for value in content.values())
    file = path / ("weights.pth" if nested else "weights.safetensors")
    if nested:
        torch.save(content, file)
    else:
        save_file({name: value.contiguous() for name, value in content.items()}, file)
    return file


@pytest.mark.parametrize("library", WRITERS)
def test_the_backbone_computes_what_the_model_of_the_library_computes(tmp_path, library):
    reference, backbone = timm_vit(), ours()
    report = vitkit.load_weights(backbone, written(tmp_path, WRITERS[library](reference.state_dict())))
    torch.testing.assert_close(backbone(images()), reference.forward_features(images()), rtol=1e-4, atol=1e-4)
    assert (report.missing, report.changed) == ([], [])
    assert sorted(report.loaded) == sorted(backbone.state_dict())
    unused = {line.split()[0].rpartition(".")[2] for line in report.unused}
    assert {"weight", "bias"} <= unused  # of the classifier, which a backbone has not
    assert "not loaded:" in str(report)


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ({"init_values": 0.5}, {}),
        ({"reg_tokens": 3}, {"registers": 3}),
        ({"reg_tokens": 3, "no_embed_class": True}, {"registers": 3}),
        ({"no_embed_class": True}, {}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"pool": "mean"}),
    ],
    ids=["layer scale", "registers", "registers without positions", "CLS without a position", "no CLS"],
)
def test_layer_scales_registers_and_positions_of_other_kinds_are_exact(tmp_path, theirs, mine):
    reference, backbone = timm_vit(**theirs), ours(**mine)
    report = load_weights(backbone, written(tmp_path, reference.state_dict()))
    torch.testing.assert_close(backbone(images()), reference.forward_features(images()), rtol=1e-4, atol=1e-4)
    assert report.missing == []
    assert all(line.startswith("head.") for line in report.unused)


def test_a_distillation_token_becomes_a_register_or_is_listed(tmp_path):
    state = timm_vit().state_dict()
    state |= {"dist_token": torch.randn(1, 1, 24), "pos_embed": torch.randn(1, 18, 24)}
    file = written(tmp_path, state)
    backbone = ours(registers=1)
    load_weights(backbone, file)
    assert torch.equal(backbone.reg_token, state["dist_token"])
    assert torch.equal(backbone.pos_embed, state["pos_embed"])
    without = ours()
    report = load_weights(without, file)
    assert torch.equal(without.pos_embed, state["pos_embed"][:, [0, *range(2, 18)]])
    assert "dist_token (1, 1, 24): the backbone has none" in report.unused


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (2, 2)])
def test_positions_and_patches_are_resampled_as_timm_does(size):
    positions = torch.randn(1, 16, 24)
    torch.testing.assert_close(resample_positions(positions, (4, 4), size), timm.layers.resample_abs_pos_embed(positions, size, (4, 4), 0))
    weight = torch.randn(24, 3, 4, 4)
    torch.testing.assert_close(resample_patches(weight, size), timm.layers.resample_patch_embed(weight, list(size)), rtol=1e-3, atol=1e-4)


def test_an_enlarged_patch_has_the_embedding_that_it_had(tmp_path):
    small, large = ours(), ours(img_size=32, patch_size=8)
    report = load_weights(large, written(tmp_path, small.state_dict()))
    patches = images(size=4)
    enlarged = torch.nn.functional.interpolate(patches, size=8, mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(large.patch_embed(enlarged), small.patch_embed(patches), rtol=1e-3, atol=1e-4)
    assert report.changed == ["patch_embed.proj.weight (24, 3, 4, 4) → (24, 3, 8, 8): resampled"]


def test_another_size_and_number_of_channels_are_adapted_and_listed(tmp_path):
    backbone = ours(img_size=24, in_chans=1)
    report = load_weights(backbone, written(tmp_path, timm_vit().state_dict()))
    assert report.changed == [
        "patch_embed.proj.weight (24, 3, 4, 4) → (24, 1, 4, 4): channels summed",
        "pos_embed (1, 17, 24) → (1, 37, 24): resampled, or set to zero for tokens without positions",
    ]
    grey = images(1)
    reference = timm_vit().patch_embed(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(backbone.patch_embed(grey), reference, rtol=1e-4, atol=1e-4)
    assert fit_channels(torch.ones(2, 3, 1, 1), 6).sum() == 6.0


def test_backbones_around_a_vit_and_of_timm_are_filled_too(tmp_path):
    reference = timm_vit()
    file = written(tmp_path, reference.state_dict())
    multimodal = backbones.build("multimodal_vit", in_chans=3, pool="cls", **SIZE).eval()
    report = load_weights(multimodal, file)
    torch.testing.assert_close(multimodal(images()), reference.forward_features(images()), rtol=1e-4, atol=1e-4)
    assert report.missing == ["label_embed.weight", "label_type"]
    if "timm" not in backbones:
        return
    wrapped = backbones.build("timm", model="vit_tiny_patch16_224", **SIZE).eval()
    assert load_weights(wrapped, file).missing == []
    torch.testing.assert_close(wrapped(images()), reference.forward_features(images()), rtol=1e-4, atol=1e-4)


def test_fixed_positions_further_blocks_and_other_widths_are_listed(tmp_path):
    file = written(tmp_path, timm_vit(depth=3).state_dict())
    report = load_weights(ours(positions="sincos2d"), file)
    assert "pos_embed (1, 17, 24): the backbone has none" in report.unused
    assert sum(line.startswith("blocks.2.") for line in report.unused) == 12
    deeper = load_weights(ours(depth=4), file)
    assert len(deeper.missing) == 12
    before = ours(embed_dim=32)
    state = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(UsageError, match=r"no block of .*weights.safetensors fits this backbone: .*the backbone has \(96, 32\)|build the"):
        load_weights(before, file)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in state.items())


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('never run')",)


@pytest.mark.parametrize("content", [Trap(), {"model": Trap()}, {"model": {"x": torch.ones(1)}, "args": argparse.Namespace(lr=1)}])
def test_a_file_that_would_run_code_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w.pth holds more than tensors, or is damaged .*would run code of the file.*save_file"):
        load_weights(ours(), tmp_path / "w.pth")


def test_files_that_are_none_and_entries_that_are_unknown(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*none.safetensors: No such file"):
        load_weights(ours(), tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="x.safetensors is no safetensors file"):
        load_weights(ours(), tmp_path / "x.safetensors")
    state = timm_vit().state_dict()
    torch.save({"online": state, "other": {}}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w.pth has no entry that is known to hold a model; its entries: online, other; give one as key"):
        load_weights(ours(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w.pth has no entry 'onlin'; did you mean 'online'\? its entries"):
        load_weights(ours(), tmp_path / "w.pth", key="onlin")
    assert load_weights(ours(), tmp_path / "w.pth", key="online").loaded
    save_file({"conv1.weight": torch.ones(2)}, tmp_path / "cnn.safetensors")
    with pytest.raises(UsageError, match="the file holds no patch embedding; its first tensors: conv1.weight"):
        load_weights(ours(), tmp_path / "cnn.safetensors")
    with pytest.raises(UsageError, match="Linear has 0 patch embeddings"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "w.pth")
