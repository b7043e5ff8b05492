"""The recipes that learn without labels, from the command line to the saved model."""

import json
from pathlib import Path

import pytest
import torch
from photographs import write_photographs

import vitkit
from vitkit.cli.run import run
from vitkit.data import build
from vitkit.errors import UsageError
from vitkit_ssl import DINOLoss, MaskedReconstruction

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ("--epochs", "2", "--eval-every", "2", "--batch-size", "32", "--embed-dim", "32", "--depth", "1", "--num-heads", "2")
DIGITS = ("--dataset", "digits", *SMALL, "--train-size", "200", "--eval-size", "100")


def train(recipe, directory, *flags, code=0):
    """The summary of a run with these flags."""
    with pytest.raises(SystemExit) as leaving:
        run(RECIPES / f"{recipe}_cifar10.py", [*flags, "--device", "cpu", "--out", str(directory)])
    assert leaving.value.code == code
    return json.loads((directory / "summary.json").read_text()) if code == 0 else {}


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mae") / "run"
    return directory, train("mae", directory, *DIGITS)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dino") / "run"
    return directory, train("dino", directory, *DIGITS, "--loss-arg", "centring=mean", "--koleo", "0.1", "--keep", "0.5")


def test_monitors_are_on_the_validation_split_beside_the_untrained_network_and_test_metrics_come_last(mae):
    _, summary = mae
    watched = {"val_knn_top1", "val_linear_top1", "val_rankme", "val_alpha_req", "val_lidar"}
    assert watched | {"knn_top1", "linear_top1", "loss"} == set(summary["final"])
    for name in watched:
        assert summary["protocols"][name]["split"] == "val"
        assert summary["protocols"][name]["untrained"] is not None
    assert summary["protocols"]["knn_top1"]["split"] == "test"
    assert summary["protocols"]["knn_top1"]["samples"] == len(build("digits").test)
    assert set(summary["references"]["raw pixels"]) == {"val_knn_top1"}
    assert summary["references"]["uninformed"]["loss"] == pytest.approx(3 / 4)  # patches of four pixels
    assert summary["final"]["loss"] < 0.75


def test_the_report_shows_images_their_visible_patches_and_the_prediction(mae):
    directory, _ = mae
    assert (directory / "plots" / "reconstructions.png").stat().st_size > 1000
    assert "predicted" in (directory / "report.html").read_text()


def test_the_saved_encoder_gives_the_features_of_all_patches(mae):
    model = vitkit.load(mae[0])
    images = build("digits").val.images[:4]
    with torch.inference_mode():
        assert model.encode_image(model.preprocess(images)).shape == (4, 32)
    assert {"backbone", "mae_decoder"} <= set(dict(model.named_children()))


def test_dino_logs_the_entropies_of_its_teacher_beside_those_of_a_uniform_one(dino):
    directory, summary = dino
    header = (directory / "losses.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "dino", "koleo", "teacher_entropy", "marginal_entropy"} <= set(header)
    uninformed = summary["references"]["uninformed"]
    assert uninformed == dict.fromkeys(("dino", "teacher_entropy", "marginal_entropy"), pytest.approx(6.931, abs=1e-3))
    assert vitkit.load(directory).encode_image(torch.zeros(1, 1, 16, 16)).shape == (1, 32)


@pytest.mark.parametrize(("recipe", "loss"), [("mae", MaskedReconstruction), ("dino", DINOLoss)])
def test_interrupted_and_resumed_it_saves_the_same_weights(recipe, loss, request, tmp_path, monkeypatch):
    directory, summary = request.getfixturevalue(recipe)
    forward, calls = loss.forward, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return forward(self, *args)

    flags = DIGITS if recipe == "mae" else (*DIGITS, "--loss-arg", "centring=mean", "--koleo", "0.1", "--keep", "0.5")
    with monkeypatch.context() as patch:
        patch.setattr(loss, "forward", interrupted)
        train(recipe, tmp_path / "cut", *flags, code=130)
    resumed = train(recipe, tmp_path / "cut", "--resume")
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    assert resumed["final"] == summary["final"]


@pytest.mark.parametrize("method", ["byol", "lejepa", "simclr", "supervised"])
def test_one_recipe_trains_the_other_methods(method, tmp_path):
    summary = train("ssl", tmp_path / "run", *DIGITS, "--method", method, "--epochs", "1", "--patch-size", "4")
    assert {"val_knn_top1", "val_linear_top1", "val_rankme", "knn_top1", "linear_top1"} <= set(summary["final"])
    assert vitkit.load(tmp_path / "run").encode_image(torch.zeros(1, 1, 16, 16)).shape == (1, 32)


@pytest.mark.parametrize("recipe", ["mae", "dino"])
def test_photographs_without_labels_have_monitors_without_labels_and_another_probe_dataset(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    folder = write_photographs(tmp_path / "photographs", 40)
    flags = ("--dataset", "image_folder", "--dataset-arg", f"root={folder}", *SMALL, "--batch-size", "8", "--probe-dataset", "digits")
    summary = train(recipe, tmp_path / "run", *flags)
    watched = {"val_rankme", "val_alpha_req", "val_feature_std", "val_lidar", "val_view_top1", "val_transfer_knn_top1"}
    assert watched <= set(summary["final"])
    assert "transfer_knn_top1" in summary["final"]
    assert "val_knn_top1" not in summary["final"]
    with pytest.raises(UsageError, match="method 'supervised' needs images with labels"):
        run(RECIPES / "ssl_cifar10.py", [*flags, "--method", "supervised", "--out", str(tmp_path / "labelled")])
