"""The JEPA recipe from the command line to the saved model: on digits always, on MNIST where it is at hand."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from photographs import write_photographs

import vitkit
from vitkit import Run
from vitkit.cli.run import run
from vitkit.data import build
from vitkit.errors import UsageError
from vitkit.training import Recipe
from vitkit_jepa import JEPA

COLUMNS = ["linear_top1", "knn_top1", "m1_top1", "m1_top3", "m2_top1", "m2_top3"]
RECIPE = Path(__file__).parents[2] / "recipes" / "jepa_mnist.py"


def train(directory, *flags):
    """The summary of a run with these flags."""
    with pytest.raises(SystemExit) as leaving:
        run(RECIPE, [*flags, "--out", str(directory)])
    assert leaving.value.code == 0
    return json.loads((directory / "summary.json").read_text())


def test_a_run_leaves_what_the_design_names(trained_run):
    for name in ("metrics.csv", "losses.csv", "summary.json", "model.safetensors", "config.json", "report.html"):
        assert (trained_run / name).stat().st_size > 100, name
    assert (trained_run / "recipe.py").read_text() == RECIPE.read_text()
    assert {path.stem for path in (trained_run / "plots").glob("*.png")} >= {"losses", "metrics", "m1_confusion"}
    with (trained_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["3", "6"]
    assert list(rows[0])[:3] == ["epoch", "step", "loss"]
    assert set(COLUMNS) <= set(rows[0])
    summary = json.loads((trained_run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["dataset"]["name"] == "digits"
    assert summary["dataset"]["fallback_for"] is None
    assert {name: protocol["chance"] for name, protocol in summary["protocols"].items()} == {
        "linear_top1": 0.1, "knn_top1": 0.1, "m1_top1": 0.1, "m1_top3": 0.3, "m2_top1": 0.1, "m2_top3": 0.3,
    }  # fmt: skip


def test_the_saved_model_gives_the_accuracy_that_was_reported(trained_run):
    model = vitkit.load(trained_run)
    data = build("digits").test
    images, labels = model.preprocess(data.images), data.labels
    summary = json.loads((trained_run / "summary.json").read_text())
    # After so short a training many images lie between two labels: in another precision some change sides.
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=summary["settings"]["precision"] == "bf16"):
        image = model.projector(model.encode_image(images))
        label = model.projector(model.backbone.encode_label(torch.arange(10)))
    nearest = torch.cosine_similarity(image[:, None].float(), label[None].float(), dim=-1).argmax(1)
    assert float((nearest == labels).float().mean()) == pytest.approx(summary["final"]["m2_top1"], abs=0.01)


def test_the_same_main_runs_without_the_command_line(tmp_path):
    notebook = Run(tmp_path / "run", device="cpu", seed=3)
    Recipe(RECIPE).main(notebook, build("digits"), epochs=1, img_size=16, patch_size=4)
    notebook.finish()
    assert vitkit.load(tmp_path / "run").classes == [str(digit) for digit in range(10)]


def test_stopped_in_the_middle_of_an_epoch_and_resumed_it_saves_the_same_weights(tmp_path, monkeypatch):
    flags = ("--dataset", "digits", "--epochs", "2", "--eval-every", "2", "--emb-dim", "32", "--depth", "2")
    train(tmp_path / "whole", *flags)
    forward, calls = JEPA.forward, []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(JEPA, "forward", stopping)
        with pytest.raises(SystemExit) as leaving:
            run(RECIPE, [*flags, "--out", str(tmp_path / "cut")])
        assert leaving.value.code == 130
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = train(tmp_path / "cut", "--resume")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == whole
    assert resumed["final"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["final"]


def test_a_dataset_that_cannot_be_had_is_replaced_only_when_none_was_named(tmp_path, monkeypatch, capfd):
    from vitkit.errors import DatasetError

    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr("socket.socket.connect", _refused)
    summary = train(tmp_path / "run", "--epochs", "1")
    assert summary["dataset"]["name"] == "digits"
    assert summary["dataset"]["fallback_for"] == "mnist"
    assert "WARNING" in capfd.readouterr().err
    assert "NOT mnist" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(DatasetError, match="dataset 'mnist' is not in the store"):
        run(RECIPE, ["--dataset", "mnist", "--out", str(tmp_path / "other")])


def test_a_dataset_is_given_its_arguments_by_flag(tmp_path):
    from vitkit.errors import ArgumentsError

    with pytest.raises(ArgumentsError, match="dataset 'digits' takes no argument 'urls'"):
        run(RECIPE, ["--dataset", "digits", "--dataset-arg", "urls=a.tar", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_without_labels_ends_with_a_report_of_label_free_monitors(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    folder = write_photographs(tmp_path / "photos", 30)
    flags = ("--dataset", "image_folder", "--dataset-arg", f"root={folder}", "--batch-size", "8", "--epochs", "2", "--depth", "1")
    with pytest.raises(UsageError, match="the images of photos have no labels; give --no-multimodal to train on images alone"):
        run(RECIPE, [*flags, "--out", str(tmp_path / "refused")])
    summary = train(tmp_path / "run", *flags, "--no-multimodal", "--probe-dataset", "digits", "--eval-size", "100")
    monitors = {"rankme", "alpha_req", "feature_std", "view_top1"}
    probes = {f"{features}_{probe}_top1" for features in ("transfer", "pixels") for probe in ("knn", "linear")}
    assert set(summary["final"]) == {"loss"} | monitors | probes
    untrained = {name for name, protocol in summary["protocols"].items() if protocol["untrained"] is not None}
    assert untrained == monitors | probes
    assert all("on digits" in summary["protocols"][name]["note"] for name in probes)
    log = (tmp_path / "run" / "log.txt").read_text()
    for name in ("linear_probe", "knn", "label_retrieval"):
        assert log.count(f"the evaluator {name} is left out: {name} needs labels") == 1
    assert "no preprocessing" not in log
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(text in report for text in ("rankme", "alpha req", "feature std", "view top-1", "untrained", "neighbours"))
    model = vitkit.load(tmp_path / "run")
    assert model.classes == []
    assert model.encode_image(model.preprocess(build("image_folder", root=str(folder)).test.images)).shape == (6, 128)


def _refused(*_):
    raise ConnectionRefusedError("no network in this test")


@pytest.mark.slow
def test_without_labels_retrieval_is_left_to_chance(tmp_path):
    summary = train(tmp_path / "run", "--dataset", "digits", "--epochs", "10", "--eval-every", "10", "--no-multimodal")
    assert summary["final"]["linear_top1"] > 0.5
    for name in ("m1_top1", "m1_top3", "m2_top1", "m2_top3"):
        assert summary["final"][name] == pytest.approx(summary["protocols"][name]["chance"])


@pytest.mark.slow
def test_it_learns_from_real_mnist(tmp_path, real_data):
    flags = ("--dataset", "mnist", "--train-size", "20000", "--epochs", "2", "--eval-every", "2")
    summary = train(tmp_path / "run", *flags)
    assert summary["dataset"]["train"] == 55_000
    assert summary["final"]["linear_top1"] > 0.75
    assert summary["final"]["m2_top1"] > 0.3
