"""A run once more: the same numbers here, a verdict within tolerances elsewhere, and never without being asked."""

import hashlib
import json

import pytest
from recipe_text import CLASSIFIER

from vitkit.reproduce import Verdict, tolerance

RECIPE = (
    '''
"""A linear classifier of digits."""
from enum import Enum
from pathlib import Path
from typing import Annotated
import torch
from vitkit import Run, heads, Scores
from vitkit.contracts import Measurement

class Kind(Enum):
    SGD = "sgd"
    ADAM = "adam"
'''
    + CLASSIFIER
    + '''
def main(run: Run, epochs: Annotated[int | None, "passes"] = None, kind: Kind = Kind.ADAM, note: Path = Path("."),
         rates: list[float] = [0.01]):
    data = run.dataset("digits", default="digits")
    run.resolved(epochs=epochs or 2, width=64)
    assert isinstance(kind, Kind) and isinstance(note, Path)
    model = Classifier(heads.build("linear", in_dim=64, out_dim=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rates[0])
    for epoch in run.fit(model, data.train.batches(64, shuffle=True), epochs=epochs or 2, optimizer=optimizer):
        test = next(iter(data.test.batches(355).epoch(0)))
        with torch.no_grad():
            hits = (model.head(test["images"].flatten(1)).argmax(1) == test["labels"]).float().mean()
        epoch.log(Scores({"top1": hits}, protocols={"top1": Measurement("test", 355, chance=0.1)}))
    run.save(classifier=model.head)
'''
)


@pytest.fixture
def vitkit(tmp_path, shell):
    (tmp_path / "linear.py").write_text(RECIPE)
    return shell


@pytest.fixture
def done(vitkit, tmp_path):
    run = vitkit("run", "linear.py", "--seed", "7", "--kind", "sgd", "--rates", "0.02", "--out", "first")
    assert run.returncode == 0, run.stderr
    return tmp_path / "first"


def change(directory, **values):
    path = directory / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_on_the_same_machine_the_numbers_are_the_same(vitkit, done, tmp_path):
    again = vitkit("reproduce", "first", "--yes", "--out", "second")
    assert again.returncode == 0, again.stdout + again.stderr
    digest = hashlib.sha256(RECIPE.encode()).hexdigest()
    assert f"this runs the Python code in first/recipe.py (of first, SHA-256 {digest}), with your rights" in again.stderr
    assert "every metric agrees; the new run: second" in again.stdout
    assert "the same number" in again.stdout
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second"))
    assert two["final"] == one["final"]
    assert two["arguments"] == one["arguments"]
    assert (two["seed"], two["recipe"]) == (7, "linear")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
    assert (tmp_path / "second" / "recipe.py").read_text() == RECIPE


def test_a_number_that_differs_here_is_named_and_the_exit_code_is_1(vitkit, done):
    final = json.loads((done / "summary.json").read_text())["final"]
    change(done, final={**final, "top1": final["top1"] - 1e-9})
    again = vitkit("reproduce", "first", "--yes", "--out", "second")
    assert again.returncode == 1
    assert "not every metric agrees" in again.stdout
    row = next(line for line in again.stdout.splitlines() if "top1" in line)
    assert "differs" in row


def test_elsewhere_a_metric_has_a_tolerance(vitkit, done):
    final = json.loads((done / "summary.json").read_text())["final"]
    change(done, final={**final, "top1": final["top1"] - 0.001, "loss": final["loss"] * 1.04}, machine="another")
    again = vitkit("reproduce", "first", "--yes", "--out", "second")
    assert again.returncode == 0, again.stdout
    assert "95 % of 355 samples" in again.stdout
    assert "5% of the value" in again.stdout
    assert "not as it was: machine: 'another' then, " in again.stdout
    change(done, final={**final, "gone": 0.5})
    missing = vitkit("reproduce", "first", "--yes", "--out", "third")
    assert missing.returncode == 1


def test_nothing_runs_without_consent(vitkit, done, monkeypatch, tmp_path):
    (done / "recipe.py").write_text("raise AssertionError('it ran')")
    silent = vitkit("reproduce", "first", "--out", "second")
    assert silent.returncode == 2
    assert "nobody is there to be asked whether that code may run; give --yes if you trust it" in silent.stderr
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert vitkit("reproduce", "first", "--out", "second").returncode == 130
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda run: change(run, status="interrupted"), "holds no finished run: there are no metrics to compare with"),
        (lambda run: (run / "summary.json").write_text("{"), "holds no finished run"),
        (lambda run: (run / "recipe.py").unlink(), "holds no recipe.py: its run was not started with `vitkit run`"),
        (lambda run: change(run, requested={}), "takes epochs, kind, note, rates, which the run's summary does not record"),
        (lambda run: change(run, requested={"epochs": 1, "kind": "x", "note": ".", "rates": [1.0]}), "'x' is not a Kind"),
        (lambda run: change(run, requested=None, arguments={}), "takes epochs, kind, note, rates, which the run's summary does"),
    ],
)
def test_what_cannot_be_reproduced(vitkit, done, spoil, text):
    spoil(done)
    answer = vitkit("reproduce", "first", "--yes", "--out", "second")
    assert answer.returncode in (1, 2)
    assert text in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_place_without_a_run(vitkit):
    answer = vitkit("reproduce", "nowhere", "--yes")
    assert answer.returncode == 2
    assert "nowhere holds no finished run" in answer.stderr
    assert "or a repository OWNER/NAME" in answer.stderr


def test_tolerances():
    protocol = {"samples": 10_000, "chance": 0.1}
    # 1.96 · √(2 · 0.5 · 0.5 / n), and still a width where every sample was a hit
    assert tolerance(0.5, protocol)[0] == pytest.approx(1.96 * (0.5 / 10_000) ** 0.5)
    assert 0 < tolerance(1.0, protocol)[0] < 1e-3
    assert tolerance(0.9, {**protocol, "samples": 100})[0] > 5 * tolerance(0.9, protocol)[0]
    assert tolerance(-40.0, None) == (pytest.approx(2.0), "5% of the value")
    assert tolerance(0.5, {"samples": 100, "chance": None})[1] == "5% of the value"


@pytest.mark.parametrize(
    ("recorded", "found", "agrees"), [(0.5, 0.6, True), (0.5, 0.61, False), (None, None, True), (None, 0.5, False), (0.5, None, False)]
)
def test_verdicts(recorded, found, agrees):
    assert Verdict("x", recorded, found, 0.1 + 1e-12, "").agrees is agrees
