"""The VAE's recipes from the command line to the saved model: on digits always, on MNIST where it is at hand."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import vitkit
from vitkit.cli.run import run
from vitkit.data import build, write_store
from vitkit_vae import MultiTaskVAE

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ["--dataset", "digits", "--img-size", "8", "--emb-dim", "32", "--depth", "1", "--num-heads", "2", "--eval-size", "300"]


def train(directory, *flags, recipe="vae_mnist"):
    """The summary of a run with these flags."""
    with pytest.raises(SystemExit) as leaving:
        run(RECIPES / f"{recipe}.py", [*TINY, *flags, "--out", str(directory)])
    assert leaving.value.code == 0
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.slow
def test_a_run_learns_and_saves_what_it_measured(tmp_path):
    summary = train(tmp_path / "run", "--epochs", "18", "--eval-every", "18", "--transfer-to", "digits")
    final = summary["final"]
    assert final["accuracy_top1"] > 0.8
    assert final["knn_top1"] > 0.8
    assert final["reconstruction_mse"] < 0.8 * summary["protocols"]["reconstruction_mse"]["chance"]
    assert final["active_units"] >= 4
    assert {"few_shot_5_top1", "silhouette", "transfer_knn_top1", "pixels_knn_top1"} <= set(final)
    plots = {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert plots >= {"losses", "embeddings", "attention", "samples", "reconstructions", "interpolations"}

    model, data = vitkit.load(tmp_path / "run"), build("digits").test
    with torch.inference_mode():
        images = model.preprocess(data.images)
        predicted = model.classifier(model.encode_image(images)).argmax(1)
        mu, _ = model.backbone.encode_latent(images)
        assert model.decoder(mu).shape == images.shape
    assert float((predicted == data.labels).float().mean()) == pytest.approx(final["accuracy_top1"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "flags", "saved"),
    [
        ("vae_mnist", "--reconstruction 0 --kl 0 --mining given --weighting uncertainty", {"backbone", "classifier", "loss"}),
        ("vae_mnist", "--no-supervised --views 2 --depth 2 --hierarchical --checkpoint --weighting progressive", {"backbone", "decoder"}),
        ("vae_cifar10", "--randaugment 5 --mix 0.5 --conditional --schedule step", {"backbone", "classifier", "decoder"}),
    ],
)
def test_runs_with_and_without_some_of_the_parts(tmp_path, recipe, flags, saved):
    summary = train(tmp_path / "run", "--epochs", "1", "--train-size", "256", *flags.split(), recipe=recipe)
    assert summary["status"] == "finished"
    model = vitkit.load(tmp_path / "run")
    assert {name for name, _ in model.named_children()} == saved
    assert ("accuracy_top1" in summary["final"]) == ("classifier" in saved)
    assert ("reconstruction_mse" in summary["final"]) == ("decoder" in saved)
    assert model.preprocess(build("digits").test.images[:2]).shape == (2, 1, 8, 8)  # kept for batches of triplets too


@pytest.mark.slow
def test_stopped_in_the_middle_and_resumed_it_saves_the_same_weights(tmp_path, monkeypatch):
    flags = ("--epochs", "2", "--eval-every", "2", "--train-size", "512", "--kl-warmup", "1.0")
    train(tmp_path / "whole", *flags)
    forward, calls = MultiTaskVAE.forward, []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(MultiTaskVAE, "forward", stopping)
        with pytest.raises(SystemExit) as leaving:
            run(RECIPES / "vae_mnist.py", [*TINY, *flags, "--out", str(tmp_path / "part")])
    assert leaving.value.code == 130
    train(tmp_path / "part", *flags, "--resume")
    whole, part = (vitkit.load(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.slow
def test_it_learns_from_real_mnist(tmp_path, real_data):
    flags = ["--dataset", "mnist", "--train-size", "6000", "--eval-size", "2000", "--epochs", "3", "--eval-every", "3"]
    with pytest.raises(SystemExit) as leaving:
        run(RECIPES / "vae_mnist.py", [*flags, "--out", str(tmp_path / "run")])
    assert leaving.value.code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dataset"]["test"] == 10_000
    assert summary["final"]["accuracy_top1"] > 0.6
    assert summary["final"]["reconstruction_mse"] < summary["protocols"]["reconstruction_mse"]["chance"]


@pytest.mark.slow
def test_a_class_of_few_images_leaves_the_few_shots_out_and_the_rest_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, labels in (("train", [0] * 60 + [1] * 8), ("val", [0] * 5 + [1] * 3), ("test", [0] * 8 + [1] * 4)):
        tensors[f"{split}.images"] = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=generator, dtype=torch.uint8)
        tensors[f"{split}.labels"] = torch.tensor(labels)
    write_store("few", tensors, ["many", "rare"])
    flags = ["--dataset", "few", *TINY[2:-2], "--epochs", "1", "--batch-size", "16", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as leaving:
        run(RECIPES / "vae_mnist.py", flags)
    assert leaving.value.code == 0
    line = "the evaluator few_shot is left out: 10 shots need as many training images of each class, but there are only 8 of 'rare'"
    assert line in (tmp_path / "run" / "log.txt").read_text()
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    assert {"knn_top1", "accuracy_top1", "reconstruction_mse", "silhouette"} <= set(final)
    assert not any(name.startswith("few_shot") for name in final)
    assert vitkit.load(tmp_path / "run").classes == ["many", "rare"]
