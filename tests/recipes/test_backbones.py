"""Every backbone in every recipe by a flag, from the command line to the saved model that is loaded again."""

import json
from pathlib import Path

import pytest
import torch

import vitkit
from vitkit import backbones
from vitkit.cli.run import run
from vitkit.data import build
from vitkit.errors import ArgumentsError, UsageError
from vitkit.registry import Spec, architecture_only

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "cct": ("preset=2_3x2", "embed_dim=16"),
    "convnext": ("preset=tiny_32", "depths=[1,1]", "widths=[8,16]"),
    "mobilevit": ("preset=tiny_32", "widths=[8,8]", "dims=[0,8]", "depths=[0,1]", "blocks=[1,1]", "strides=[1,2]"),
    "pvt": ("preset=tiny_32", "depths=[1,1]", "widths=[8,16]", "num_heads=[1,2]", "reductions=[2,1]", "mlp_ratios=[2,2]"),
    "swin": ("preset=tiny_32", "embed_dim=8", "depths=[1,2]", "num_heads=[1,2]"),
    "vit": ("embed_dim=16", "depth=2", "num_heads=2", "attention=windowed", "window=2", "patch_size=4"),
}
FLAGS = ("--dataset", "digits", "--epochs", "1", "--train-size", "128", "--batch-size", "32", "--eval-every", "1", "--device", "cpu")


def backbone_flags(name):
    return ("--backbone", name, *(word for pair in SMALL[name] for word in ("--backbone-arg", pair)))


def train(recipe, directory, *flags):
    """The loaded model of a run."""
    with pytest.raises(SystemExit) as leaving:
        run(RECIPES / f"{recipe}.py", [*FLAGS, *flags, "--out", str(directory)])
    assert leaving.value.code == 0
    assert json.loads((directory / "summary.json").read_text())["status"] == "finished"
    return vitkit.load(directory)


def encoded(model):
    return model.encode_image(model.preprocess(build("digits").test.images[:3]))


def arguments(name):
    pairs = (pair.split("=", 1) for pair in SMALL[name])
    return {key: value if value[0].isalpha() or value == "2_3x2" else json.loads(value) for key, value in pairs}


@pytest.mark.parametrize("name", SMALL)
def test_it_encodes_for_the_vae_at_several_depths(name):
    x = torch.randn(2, 3, 16, 16)
    model = backbones.build("vae_encoder", img_size=16, backbone=name, backbone_args=arguments(name), depths="all", latent_dim=4)
    mu, log_var = model.eval().encode_latent(x)
    assert mu.shape == log_var.shape == (2, 4)
    assert len(model.depths) == 2
    assert model(x).shape == (2, model.vit.num_patches, model.embed_dim)


@pytest.mark.parametrize("name", SMALL)
def test_it_encodes_pairs_and_images_beside_labels(name):
    pairs = backbones.build("pair_backbone", backbone=name, img_size=16, backbone_args=arguments(name)).eval()
    assert pairs.encode_halves(torch.randn(2, 3, 16, 32)).shape == (2, 2, pairs.embed_dim)
    multimodal = backbones.build("multimodal_vit", img_size=16, in_chans=3, backbone=name, backbone_args=arguments(name)).eval()
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    assert multimodal.encode_image(x).shape == (2, multimodal.embed_dim)
    assert multimodal.takes_labels == (name in ("cct", "vit"))
    if multimodal.takes_labels:
        assert multimodal.label_attention(x, labels).shape == (2, *multimodal.grid_size)
    else:
        with pytest.raises(UsageError, match="takes neither a label's token nor a choice of patches"):
            multimodal.encode_multimodal(x, labels)


@pytest.mark.parametrize("kind", ["vae_encoder", "pair_backbone", "multimodal_vit"])
def test_a_saved_model_names_no_weights_and_no_path_for_its_backbone(kind):
    what = {"img_size": 16, "backbone": "swin"}
    for args in ({"preset": "a/b"}, {"file": "x"}, {"pretrained": True}):
        spec = Spec("backbone", kind, "vitkit", {**what, "backbone_args": args})
        with pytest.raises(ArgumentsError), architecture_only(10**6):
            spec.build()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pvt", "swin"])
def test_the_vae_trains_on_it(name, tmp_path):
    model = train("vae_cifar10", tmp_path / "run", *backbone_flags(name), "--img-size", "16", "--eval-size", "64")
    assert model.backbone.vit.spec.name == name
    assert encoded(model).shape == (3, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "mobilevit"])
def test_clip_encodes_each_half_by_it(name, tmp_path):
    model = train("clip_cifar100", tmp_path / "run", *backbone_flags(name), "--augment", "shift")
    assert model.backbone.backbone.spec.name == name
    halves = torch.randn(2, 1, 16, 32)
    with torch.inference_mode():
        left, right = model.backbone.encode_halves(halves).unbind(1)
        swapped = model.backbone.encode_halves(halves.roll(16, dims=-1))
    torch.testing.assert_close(swapped, torch.stack([right, left], dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_supervised_recipe_trains_it_from_scratch(tmp_path):
    model = train("finetune", tmp_path / "run", *backbone_flags("mobilevit"))
    assert model.backbone.spec.name == "mobilevit"
    assert encoded(model).shape == (3, 256)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cct", "vit"])
def test_a_label_enters_the_stack_of_the_jepa(name, tmp_path):
    model = train("jepa_mnist", tmp_path / "run", *backbone_flags(name), "--img-size", "16", "--eval-size", "64", "--keep", "0.5")
    assert model.backbone.vit.spec.name == name
    assert model.backbone.encode_label(torch.arange(10)).shape == (10, 16)
    assert "m1_top1" in json.loads((tmp_path / "run" / "summary.json").read_text())["final"]


@pytest.mark.slow
def test_the_jepa_on_images_alone_takes_a_pyramid_and_says_why_not_a_label(tmp_path):
    flags = (*backbone_flags("swin"), "--img-size", "16", "--eval-size", "64")
    model = train("jepa_mnist", tmp_path / "run", *flags, "--no-multimodal")
    assert encoded(model).shape == (3, 16)
    with pytest.raises(UsageError, match="Swin takes neither a label's token nor a choice of patches: .* take vit or cct, or"):
        run(RECIPES / "jepa_mnist.py", [*FLAGS, *flags, "--out", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()
