"""A run again: the same numbers here, a verdict within tolerances elsewhere, and no code runs without consent."""

import hashlib
import json
from pathlib import Path

import pytest
from recipe_text import CLASSIFIER
from rich.console import Console

from vitkit.reproduce import Verdict, reproduce, tolerance

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
    assert isinstance(kind, Kind) and isinstance(note, Path)
    model = Classifier(heads.build("linear", in_dim=64, out_dim=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rates[0])
    for epoch in run.fit(model, data.train.batches(64, shuffle=True), epochs=epochs or 2, optimizer=optimizer):
        test = next(iter(data.test.batches(382).epoch(0)))
        with torch.no_grad():
            hits = (model.head(test["images"].flatten(1)).argmax(1) == test["labels"]).float().mean()
        epoch.log(Scores({"top1": hits}, protocols={"top1": Measurement("test", 382, chance=0.1, kind="proportion")}))
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
    assert "95 % of 382 samples" in again.stdout
    assert "5% of the value" in again.stdout
    assert "not as recorded: machine: 'another' then, " in again.stdout
    change(done, final={**final, "gone": 0.5})
    missing = vitkit("reproduce", "first", "--yes", "--out", "third")
    assert missing.returncode == 1


def test_nothing_runs_without_consent(vitkit, done, monkeypatch, tmp_path):
    (done / "recipe.py").write_text("raise AssertionError('it ran')")
    silent = vitkit("reproduce", "first", "--out", "second")
    assert silent.returncode == 2
    assert "there is no terminal to confirm that this code may run; give --yes if you trust it" in silent.stderr
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


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"recipe": "../../x"}, "first/summary.json: recipe is '../../x'; expected the name of a recipe: letters, digits"),
        ({"recipe": "/elsewhere/x"}, "recipe is '/elsewhere/x'; expected the name"),
        ({"recipe": ".."}, "recipe is '..'; expected the name"),
        ({"recipe": "x\x1b[2J"}, "recipe is 'x\\x1b[2J'; expected the name"),
        ({"settings": []}, "settings is []; expected a mapping of names to values"),
        ({"settings": {"threads": "many"}}, "settings.threads is 'many'; expected a whole number from 1 to 4096"),
        ({"settings": {"threads": 10**9}}, "settings.threads is 1000000000; expected a whole number"),
        ({"settings": {"device": 3}}, "settings.device is 3; expected a text"),
        ({"settings": {"seed": 0.5}}, "settings.seed is 0.5; expected a whole number"),
        ({"seconds": "long"}, "seconds is 'long'; expected a finite number"),
        ({"final": {"top1": "high"}}, "final.top1 is 'high'; expected a finite number"),
        ({"protocols": {"top1": 3}}, "protocols.top1 is 3; expected a mapping of names to values"),
        ({"protocols": {"top1": {"samples": "x"}}}, "protocols.top1.samples is 'x'; expected a whole number"),
        ({"protocols": {"top1": {"chance": []}}}, "protocols.top1.chance is []; expected a finite number"),
        ({"dataset": "digits"}, "dataset is 'digits'; expected a mapping of names to values"),
        ({"versions": 1}, "versions is 1; expected a mapping of names to values"),
        ({"requested": 3}, "requested is 3; expected a mapping of names to values"),
    ],
)
def test_a_summary_is_validated_before_anything_is_asked_or_run(vitkit, done, tmp_path, fields, text):
    change(done, **fields)
    answer = vitkit("reproduce", "first", "--yes", "--out", "second")
    assert answer.returncode == 2
    assert text in answer.stderr
    assert "this runs the Python code" not in answer.stderr
    assert not (tmp_path / "second").exists()


def test_a_place_without_a_run(vitkit, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = vitkit("reproduce", "empty", "--yes")
    assert answer.returncode == 2
    assert "empty holds no finished run" in answer.stderr
    assert "or a repository hf://OWNER/NAME" in answer.stderr


@pytest.mark.parametrize("flags", [["--yes"], ["--trust-remote-code"], ["--yes", "--trust-remote-code"], []])
def test_a_missing_directory_is_never_fetched_from_the_hub(vitkit, hub_server, flags):
    answer = vitkit("reproduce", "runs/jepa", *flags)
    assert answer.returncode == 2
    assert "there is no directory runs/jepa; give the directory of a finished run" in answer.stderr
    assert "for a repository of the Hub give hf://runs/jepa" in answer.stderr
    assert hub_server.requests == []


@pytest.fixture
def published(hub_server, done):
    """The run `first` as a stranger's repository."""
    names = ("model.safetensors", "config.json", "summary.json", "recipe.py", "metrics.csv", "losses.csv")
    hub_server.put("stranger/linear", {name: (done / name).read_bytes() for name in names})
    return hub_server


def test_yes_does_not_cover_code_of_the_hub(vitkit, published, tmp_path):
    answer = vitkit("reproduce", "hf://stranger/linear", "--yes", "--out", "second")
    assert answer.returncode == 2
    assert "(of hf://stranger/linear, SHA-256 " in answer.stderr
    assert "give --trust-remote-code (--yes does not cover it)" in answer.stderr
    assert not (tmp_path / "second").exists()


def test_yes_does_not_cover_code_that_was_pulled_from_the_hub(vitkit, published, tmp_path):
    assert vitkit("pull", "stranger/linear", "-o", "pulled").returncode == 0
    answer = vitkit("reproduce", "pulled", "--yes", "--out", "second")
    assert answer.returncode == 2
    assert "give --trust-remote-code (--yes does not cover it)" in answer.stderr
    assert not (tmp_path / "second").exists()


def test_code_of_the_hub_runs_after_its_own_flag(vitkit, published, tmp_path):
    answer = vitkit("reproduce", "hf://stranger/linear", "--trust-remote-code", "--out", "second")
    assert answer.returncode == 0, answer.stderr
    assert "every metric agrees" in answer.stdout
    assert (tmp_path / "second" / "recipe.py").read_text() == RECIPE


def test_trust_in_remote_code_does_not_cover_a_local_run(vitkit, done, tmp_path):
    answer = vitkit("reproduce", "first", "--trust-remote-code", "--out", "second")
    assert answer.returncode == 2
    assert "give --yes if you trust it" in answer.stderr
    assert not (tmp_path / "second").exists()


def test_a_local_directory_of_that_name_does_not_replace_a_repository(vitkit, published, tmp_path):
    (tmp_path / "stranger" / "linear").mkdir(parents=True)
    answer = vitkit("reproduce", "hf://stranger/linear", "--out", "second")
    assert "SHA-256" in answer.stderr
    assert "--trust-remote-code" in answer.stderr


@pytest.mark.parametrize("name", ["hf://", "hf://one", "hf://a/b/c", "hf://../x", "hf://a/../b"])
def test_a_name_that_no_repository_can_have_is_refused(vitkit, hub_server, name):
    answer = vitkit("reproduce", name, "--trust-remote-code")
    assert answer.returncode == 2
    assert "no name of a Hub repository" in answer.stderr
    assert hub_server.requests == []


def test_the_bytes_that_were_hashed_are_the_bytes_that_run(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def swap(code):
        seen.append(code.warning)
        (done / "recipe.py").write_text("raise AssertionError('the swapped file ran')")
        (done / "enum.py").write_text("raise AssertionError('a module beside the recipe ran')")
        return True

    reproduction = reproduce("first", out=Path("second"), confirm=swap, console=Console(stderr=True))
    assert reproduction is not None
    assert reproduction.agrees
    assert hashlib.sha256((tmp_path / "second" / "recipe.py").read_bytes()).hexdigest() in seen[0]
    assert (tmp_path / "second" / "recipe.py").read_text() == RECIPE


def test_the_question_cannot_be_overwritten_by_the_run_that_it_is_about(vitkit, done):
    change(done, machine="\r\x1b[2K\x1b[1Athis is harmless\x07\u202e")
    answer = vitkit("reproduce", "first", "--out", "second")
    assert "\\x1b[2K\\x1b[1Athis is harmless\\x07\\u202e" in answer.stderr
    assert not set(answer.stderr) & set("\x1b\r\x07\u202e")


def test_a_recipe_that_nobody_could_read_is_refused(vitkit, done):
    (done / "recipe.py").write_bytes(b"#" * (2**20 + 1))
    answer = vitkit("reproduce", "first", "--yes")
    assert answer.returncode == 2
    assert "the code in first is longer than 1,048,576 bytes; it is too long to read, so it is not run" in answer.stderr


def test_modules_beside_a_recipe_are_part_of_the_hashed_code(vitkit, tmp_path):
    text = RECIPE.replace("from enum import Enum", "from enum import Enum\nfrom beside import EPOCHS")
    text = text.replace("epochs or 2", "epochs or EPOCHS")
    (tmp_path / "linear.py").write_text(text)
    (tmp_path / "beside.py").write_text("EPOCHS = 2\n")
    run = vitkit("run", "linear.py", "--out", "first")
    assert run.returncode == 0, run.stderr
    (tmp_path / "beside.py").unlink()
    digest = hashlib.sha256(b"EPOCHS = 2\n").hexdigest()

    def swap(code):
        assert f"and in modules/beside.py (SHA-256 {digest})" in code.warning
        (tmp_path / "first" / "modules" / "beside.py").write_text("raise AssertionError('the swapped file ran')")
        return True

    reproduction = reproduce("first", out=Path("second"), confirm=swap, console=Console(stderr=True))
    assert reproduction is not None
    assert reproduction.agrees


def test_tolerances():
    protocol = {"samples": 10_000, "chance": 0.1}
    # 1.96 · √(2 · 0.5 · 0.5 / n), and still a width where every sample was a hit
    assert tolerance(0.5, protocol)[0] == pytest.approx(1.96 * (0.5 / 10_000) ** 0.5)
    assert 0 < tolerance(1.0, protocol)[0] < 1e-3
    assert tolerance(0.9, {**protocol, "samples": 100})[0] > 5 * tolerance(0.9, protocol)[0]
    assert tolerance(-40.0, None) == (pytest.approx(2.0), "5% of the value")
    assert tolerance(0.5, {"samples": 100, "chance": None})[1] == "5% of the value"


def test_the_recorded_kind_decides_the_tolerance():
    error = {"kind": "error", "samples": 10_000, "chance": 0.08}
    assert tolerance(0.05, error) == (pytest.approx(0.0025), "5% of the value")
    assert tolerance(0.5, {"kind": "proportion", "samples": 10_000, "chance": None})[1] == "95 % of 10,000 samples"


@pytest.mark.parametrize(
    ("recorded", "reproduced", "agrees"), [(0.5, 0.6, True), (0.5, 0.61, False), (None, None, True), (None, 0.5, False), (0.5, None, False)]
)
def test_verdicts(recorded, reproduced, agrees):
    assert Verdict("x", recorded, reproduced, 0.1 + 1e-12, "").agrees is agrees
