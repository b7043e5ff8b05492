"""BYOL on the public interface alone: a teacher, asymmetric views, a folder of images of mixed sizes without labels."""

import ast
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from photographs import write_photographs

import vitkit
from vitkit import Run
from vitkit.cli.run import run
from vitkit.data import build
from vitkit.training import Recipe

RECIPE = Path(__file__).parent / "byol.py"
PUBLIC = {"torch", "torch.nn.functional", "typing", "vitkit", "vitkit.contracts", "vitkit.data", "vitkit.training", "vitkit.transforms"}
SMALL = ("--epochs", "3", "--eval-every", "3", "--batch-size", "8", "--depth", "1", "--embed-dim", "16")


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITKIT_DATA", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"), 40)


def train(directory, photographs, *flags):
    """The exit code of a run on the folder."""
    data = () if "--resume" in flags else ("--dataset", "image_folder", "--dataset-arg", f"root={photographs}", *SMALL)
    with pytest.raises(SystemExit) as leaving:
        run(RECIPE, [*data, *flags, "--device", "cpu", "--out", str(directory)])
    return leaving.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photographs):
    directory = tmp_path_factory.mktemp("byol") / "run"
    assert train(directory, photographs) == 0
    return directory


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


def test_the_recipe_imports_only_what_is_public():
    for node in ast.walk(ast.parse(RECIPE.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= PUBLIC
        elif isinstance(node, ast.ImportFrom):
            assert node.module in PUBLIC
            exported = getattr(import_module(node.module), "__all__", ())
            assert node.module == "torch" or {alias.name for alias in node.names} <= set(exported)


def test_monitors_without_labels_are_logged_on_validation_beside_the_untrained_network(trained):
    facts = summary(trained)
    assert facts["status"] == "finished"
    assert (facts["dataset"]["train"], facts["dataset"]["val"], facts["dataset"]["test"]) == (29, 3, 8)
    assert set(facts["final"]) == {"loss", "val_rankme", "val_feature_std", "val_view_top1"}
    for name, protocol in facts["protocols"].items():
        assert (protocol["split"], protocol["samples"]) == ("val", 3)
        assert protocol["untrained"] is not None, name
    assert facts["protocols"]["val_rankme"]["untrained"] != facts["final"]["val_rankme"]


def test_the_loss_has_an_uninformed_value_and_falls_below_it(trained):
    facts = summary(trained)
    assert facts["references"]["uninformed"] == {"loss": 2.0}
    assert facts["final"]["loss"] < 2.0


def test_an_evaluator_that_needs_labels_says_so(trained):
    log = (trained / "log.txt").read_text()
    assert "the evaluator linear_probe is left out: linear_probe needs labels, and the train images of" in log


def test_the_report_shows_the_monitors_their_untrained_values_and_images(trained):
    report = (trained / "report.html").read_text()
    for text in ("rankme", "feature std", "view top-1", "untrained", "neighbours", "uninformed"):
        assert text in report
    assert (trained / "plots" / "val_neighbours.png").stat().st_size > 1000


def test_the_saved_encoder_is_loaded_and_gives_the_features_of_the_trained_one(trained, photographs):
    model = vitkit.load(trained)
    assert model.classes == []
    images = build("image_folder", root=str(photographs)).val.images
    with torch.inference_mode():
        features = model.encode_image(model.preprocess(images))
    assert features.shape == (3, 16)
    assert bool(features.isfinite().all())


def test_interrupted_and_resumed_it_saves_the_same_weights(tmp_path, photographs, trained, monkeypatch):
    from vitkit.training import MomentumTeacher

    update, calls = MomentumTeacher.after_step, []

    def interrupted(self, step, total):
        update(self, step, total)
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MomentumTeacher, "after_step", interrupted)
        assert train(tmp_path / "cut", photographs) == 130
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert train(tmp_path / "cut", photographs, "--resume") == 0
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert summary(tmp_path / "cut")["final"] == summary(trained)["final"]
    assert summary(tmp_path / "cut")["protocols"] == summary(trained)["protocols"]


def test_the_teacher_moves_towards_the_student_without_gradients(tmp_path, photographs, monkeypatch):
    recipe, made = Recipe(RECIPE), []
    byol = recipe.main.__globals__["BYOL"]
    init = byol.__init__

    def kept(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append((self, flat(self.teacher)))

    monkeypatch.setattr(byol, "__init__", kept)
    notebook = Run(tmp_path / "run", device="cpu", precision="fp32")
    data = build("image_folder", root=str(photographs))
    recipe.main(notebook, data, epochs=2, batch_size=8, depth=1, embed_dim=16, momentum=0.5)
    notebook.finish()
    model, first = made[0]
    student, teacher = torch.cat([flat(model.backbone), flat(model.projector)]), flat(model.teacher)
    assert 0 < (student - teacher).norm() < (student - first).norm()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.teacher.parameters())


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_a_dry_run_shows_the_views(tmp_path, photographs, capfd):
    assert train(tmp_path / "run", photographs, "--dry-run") == 0
    assert "views" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
