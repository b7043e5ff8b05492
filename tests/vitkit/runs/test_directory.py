"""A run's directory through refusals, replacements and resumptions: what is there stays until a first step is taken."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_text import CLASSIFIER

from vitkit import Run, data
from vitkit.errors import MissingDatasetError, UsageError
from vitkit.runs.directory import REPLACED, trackers_aside

RECIPE = (
    '''
"""A linear classifier of digits."""
import os
import signal
import torch
from vitkit import Run, heads
'''
    + CLASSIFIER
    + '''
PRESETS = {"large": {}, "small": {"width": 8}}
def main(run: Run, dataset: str = "digits", epochs: int = 2, lr: float = 0.01, width: int = 64, kind: str = "auto",
         stop: int = 0, broken: bool = False):
    data = run.dataset(dataset, default="mnist")
    run.say(f"kind {kind}")
    head = heads.build("linear", in_dim=64, out_dim=10)
    if stop < 0 and not run.resuming:
        raise KeyboardInterrupt
    model = Classifier(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if broken:
        raise ArithmeticError("before the first step")
    for epoch in run.fit(model, data.train.stratified_subset(200).batches(50), epochs=epochs, optimizer=optimizer):
        epoch.log(score=epoch.losses["loss"])
        if epoch.number == stop and not run.resuming:
            os.kill(os.getpid(), signal.SIGINT)
    run.save(classifier=head)
'''
)
QUICK = ("--device", "cpu", "--compile", "off")


@pytest.fixture
def vitkit(tmp_path, shell, monkeypatch):
    (tmp_path / "tiny.py").write_text(RECIPE)
    monkeypatch.setattr("vitkit.report.write_report", lambda *_: None)  # its plots take longer than everything else
    return shell


@pytest.fixture
def finished(vitkit, tmp_path):
    done = vitkit("run", "tiny.py", *QUICK, "--out", "done")
    assert done.returncode == 0, done.stderr
    return tmp_path / "done"


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.parametrize(("flags", "text"), [((), "is not empty and holds no run"), (("--overwrite",), "is not empty and holds no run")])
def test_a_persons_own_recipe_and_log_are_no_leftovers_of_a_run(vitkit, tmp_path, monkeypatch, flags, text):
    own = tmp_path / "own"
    own.mkdir()
    (own / "recipe.py").write_text(RECIPE)
    (own / "log.txt").write_text("precious")
    before = contents(own)
    monkeypatch.chdir(own)
    for more in (("--dataset", "dgits"), ()):
        refused = vitkit("run", "recipe.py", "--out", ".", *more, *flags)
        assert refused.returncode == 2
        assert text in refused.stderr
        assert contents(own) == before
        assert not (own / ".lock").exists()


def test_a_refused_run_leaves_an_empty_directory_of_ones_own(vitkit, tmp_path):
    (tmp_path / "own").mkdir()
    assert vitkit("run", "tiny.py", "--out", "own", "--epochs", "0").returncode == 2
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("--dataset", "dgits"), 2, "no dataset named 'dgits'; did you mean 'digits'?"),
        (("--report-to", "tensorbord"), 2, "--report-to tensorbord: no such tracker; did you mean 'tensorboard'?"),
        (("--epochs", "0"), 2, "epochs is 0; expected at least 1"),
        (("--precision", "fp16", "--device", "cpu"), 2, "--precision fp16 needs a CUDA device"),
        (("--broken",), 1, "ArithmeticError: before the first step"),
        (("--stop", "-1"), 130, "stopped; no step was taken, and done holds the earlier run as it was"),
    ],
)
def test_a_run_that_takes_no_step_replaces_nothing(vitkit, finished, flags, code, text):
    before = contents(finished)
    refused = vitkit("run", "tiny.py", "--out", "done", "--overwrite", *flags)
    assert refused.returncode == code
    assert text in refused.stderr
    assert contents(finished) == before
    assert vitkit("run", "tiny.py", *QUICK, "--out", "done", "--overwrite", "--epochs", "1").returncode == 0
    assert (summary_of(finished)["status"], summary_of(finished)["epochs"]) == ("finished", 1)


def test_a_replaced_run_leaves_nothing_behind(vitkit, finished):
    (finished / "plots").mkdir()
    (finished / "plots" / "old.png").write_bytes(b"old")
    (finished / "log.txt").write_text("old words")
    assert vitkit("run", "tiny.py", *QUICK, "--out", "done", "--overwrite").returncode == 0
    assert not (finished / "plots" / "old.png").exists()
    log = (finished / "log.txt").read_text()
    assert "old words" not in log
    assert "kind auto" in log  # said before the first step
    assert log.index("kind auto") < log.index("epoch 1/2")


def test_trackers_that_do_not_start_leave_those_of_the_earlier_run(tmp_path):
    old = tmp_path / "trackers" / "events"
    old.parent.mkdir()
    old.write_text("old")

    def start(error):
        with trackers_aside(tmp_path):
            (tmp_path / "trackers").mkdir()
            (tmp_path / "trackers" / "new").write_text("new")
            if error:
                raise ValueError("no login")

    with pytest.raises(ValueError, match="no login"):
        start(error=True)
    assert [path.name for path in (tmp_path / "trackers").iterdir()] == ["events"]
    start(error=False)
    assert [path.name for path in (tmp_path / "trackers").iterdir()] == ["new"]


def test_an_earlier_runs_trackers_are_found_again_after_a_kill(finished):
    (finished / REPLACED / "trackers").mkdir(parents=True)
    (finished / REPLACED / "trackers" / "events").write_text("old")
    (finished / "trackers").mkdir()
    Run(finished, device="cpu", overwrite=True).close()
    assert [path.name for path in (finished / "trackers").iterdir()] == ["events"]
    assert not (finished / REPLACED).exists()


def test_a_runs_own_copy_of_its_recipe_replaces_it_and_goes_on_with_it(vitkit, finished):
    again = vitkit("run", "done/recipe.py", *QUICK, "--out", "done", "--overwrite", "--stop", "1")
    assert again.returncode == 130, again.stderr
    assert (finished / "recipe.py").read_text() == RECIPE
    on = vitkit("run", "done/recipe.py", "--out", "done", "--resume")
    assert on.returncode == 0, on.stderr
    assert (finished / "recipe.py").read_text() == RECIPE
    assert summary_of(finished)["status"] == "finished"


def test_what_was_asked_for_is_kept_beside_what_it_was_resolved_to(vitkit, tmp_path):
    asked = ("--precision", "auto", "--preset", "auto")
    assert vitkit("run", "tiny.py", *QUICK, *asked, "--out", "a", "--stop", "1").returncode == 130
    kept = summary_of(tmp_path / "a")
    assert (kept["arguments"]["preset"], kept["arguments"]["width"]) == ("large", 64)
    assert kept["requested"] == {
        "preset": "auto", "dataset": "digits", "epochs": 2, "lr": 0.01, "width": None, "kind": "auto", "stop": 1, "broken": False,
        "seed": 0, "device": "cpu", "precision": "auto", "compile": "off", "grad_accum": 1, "report_to": "csv",
    }  # fmt: skip
    wrong = vitkit("run", "tiny.py", "--out", "a", "--resume", "--preset", "small")
    assert wrong.returncode == 2
    assert "--preset was 'auto' when a was started and is now 'small'; leave the flag out to resume" in wrong.stderr
    assert summary_of(tmp_path / "a") == kept  # a refusal changes nothing
    on = vitkit("run", "tiny.py", "--out", "a", "--resume", *asked, "--width", "64", "--precision", kept["settings"]["precision"])
    assert on.returncode == 0, on.stderr
    assert summary_of(tmp_path / "a")["requested"] == kept["requested"]


def test_a_run_is_reproduced_as_it_was_asked_for(vitkit, finished, tmp_path):
    again = vitkit("reproduce", "done", "--yes", "--out", "again")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "kind auto" in (tmp_path / "again" / "log.txt").read_text()
    assert summary_of(tmp_path / "again")["final"] == summary_of(finished)["final"]


def test_device_compile_and_trackers_are_those_that_the_run_was_started_with(vitkit, tmp_path):
    start = ("run", "tiny.py", *QUICK, "--report-to", "csv,tensorboard", "--out", "a", "--epochs", "3", "--stop", "1")
    assert vitkit(*start).returncode == 130
    assert vitkit("run", "tiny.py", "--out", "a", "--resume").returncode == 0
    kept = summary_of(tmp_path / "a")
    assert (kept["requested"]["device"], kept["settings"]["compile"], kept["requested"]["report_to"]) == ("cpu", "off", "csv,tensorboard")
    assert len(list((tmp_path / "a").glob("trackers/tiny/events.*"))) == 2  # a file of each sitting
    assert kept["command"] == "vitkit run tiny.py --epochs 3 --stop 1 --device cpu --compile off --report-to csv,tensorboard"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_gone(vitkit, tmp_path):
    assert vitkit("run", "tiny.py", *QUICK, "--out", "a", "--stop", "1").returncode == 130
    kept = summary_of(tmp_path / "a")
    path = tmp_path / "a" / "summary.json"
    path.write_text(json.dumps({**kept, "requested": {**kept["requested"], "device": "cuda", "precision": "fp16"}}))
    contrary = vitkit("run", "tiny.py", "--out", "a", "--resume")
    assert contrary.returncode == 2
    assert "--precision fp16 needs a CUDA device, this run is on cpu" in contrary.stderr
    path.write_text(json.dumps({**kept, "requested": {**kept["requested"], "device": "cuda"}}))
    on = vitkit("run", "tiny.py", "--out", "a", "--resume")
    assert on.returncode == 0, on.stderr
    assert "a was started with --device cuda: this machine has cpu; resuming with --device auto" in on.stderr


@pytest.fixture
def shelf(monkeypatch):
    """`shelf["mnist"]` is what `mnist` is: nothing at first, so that it cannot be had."""
    found, build = {}, data.build

    def from_shelf(name, **kwargs):
        if name in found:
            return found[name]
        if name == "mnist":
            raise MissingDatasetError("no network")
        return build(name, **kwargs)

    monkeypatch.setattr("vitkit.data.dataset.build", from_shelf)
    return found


def test_a_run_that_fell_back_to_digits_goes_on_with_them(vitkit, tmp_path, shelf):
    auto = ("run", "tiny.py", "--dataset", "auto", *QUICK)
    assert vitkit(*auto, "--out", "whole").returncode == 0
    assert vitkit(*auto, "--out", "a", "--stop", "1").returncode == 130
    digits = data.build("digits")
    shelf["mnist"] = replace(digits, name="mnist", train=digits.train.stratified_subset(500))
    on = vitkit("run", "tiny.py", "--out", "a", "--resume")
    assert on.returncode == 0, on.stderr
    assert "this run began without mnist and resumes without it: training on scikit-learn's digits instead" in on.stderr
    whole, cut = summary_of(tmp_path / "whole"), summary_of(tmp_path / "a")
    assert (cut["dataset"]["name"], cut["dataset"]["fallback_for"]) == ("digits", "mnist")
    assert cut["final"] == whole["final"]


def test_a_run_never_goes_on_with_other_images(vitkit, tmp_path, shelf):
    digits = data.build("digits")
    shelf["mnist"] = replace(digits, name="mnist")
    assert vitkit("run", "tiny.py", "--dataset", "auto", *QUICK, "--out", "a", "--stop", "1").returncode == 130
    before = contents(tmp_path / "a")
    shelf["mnist"] = replace(digits, name="mnist", train=digits.train.stratified_subset(500))
    fewer = vitkit("run", "tiny.py", "--out", "a", "--resume")
    assert fewer.returncode == 2
    assert (
        f"the run in a began with {len(digits.train)} train + {len(digits.test)} test images of mnist, and now there are 500 train "
        f"+ {len(digits.test)} test of mnist; put that dataset back to resume, or start another run with another --out"
    ) in fewer.stderr
    assert contents(tmp_path / "a") == before
    shelf.clear()
    gone = vitkit("run", "tiny.py", "--out", "a", "--resume")
    assert gone.returncode == 1
    assert "no network" in gone.stderr
    assert summary_of(tmp_path / "a")["status"] == "interrupted"


def way_on(printed):
    return shlex.split(re.search(r"resume with: vitkit (.*)", printed)[1])


def test_the_command_that_goes_on_is_accepted_as_it_is_printed(vitkit, tmp_path):
    stopped = vitkit("run", "tiny.py", *QUICK, "--precision", "auto", "--stop", "1", "--out", "it's a place")
    assert stopped.returncode == 130
    on = vitkit(*way_on(stopped.stderr))
    assert on.returncode == 0, on.stderr
    assert summary_of(tmp_path / "it's a place")["status"] == "finished"


def test_a_reproduction_that_is_stopped_goes_on(vitkit, tmp_path):
    first = tmp_path / "first one"
    started = vitkit("run", "tiny.py", *QUICK, "--stop", "1", "--out", "first one")
    assert vitkit(*way_on(started.stderr)).returncode == 0
    stopped = vitkit("reproduce", "first one", "--yes", "--out", "second one")
    assert stopped.returncode == 130
    assert way_on(stopped.stderr) == ["reproduce", "first one", "--out", "second one", "--resume"]
    on = vitkit(*way_on(stopped.stderr), "--yes")
    assert on.returncode == 0, on.stdout + on.stderr
    assert "every metric agrees" in on.stdout
    assert summary_of(tmp_path / "second one")["final"] == summary_of(first)["final"]
    nowhere = vitkit("reproduce", "first one", "--yes", "--resume")
    assert nowhere.returncode == 2
    assert "--resume continues a reproduction that was stopped: give its directory with --out" in nowhere.stderr
    none = vitkit("reproduce", "first one", "--yes", "--resume", "--out", "third")
    assert none.returncode == 2
    assert "third holds no reproduction of first one that was stopped; leave out --resume to start one" in none.stderr


def test_under_a_launcher_the_command_says_so(tmp_path, monkeypatch):
    run = Run(tmp_path / "a b", device="cpu", command="vitkit run tiny.py")
    monkeypatch.setenv("RANK", "0")
    said = "resume with the same launcher and its flags in front: torchrun ... -m vitkit run tiny.py --out "
    assert run.session.how_to_resume() == f"{said}'{tmp_path}/a b' --resume"
    run.close()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--resume",), "new/deep holds no run to resume; leave out --resume to start one there"),
        (("--report-to", "tensorbord"), "--report-to tensorbord: no such tracker"),
        (("--dry-run", "--resume", "--overwrite"), "--resume continues a run and --overwrite discards it; give one of the two"),
    ],
)
def test_a_refusal_leaves_no_directory_behind(vitkit, tmp_path, flags, text):
    refused = vitkit("run", "tiny.py", "--out", "new/deep", *flags)
    assert refused.returncode == 2
    assert text in refused.stderr
    assert not (tmp_path / "new").exists()


def test_settings_that_accelerate_refuses_leave_no_directory_behind(tmp_path, monkeypatch):
    def refuse(**_):
        raise ValueError("no such backend")

    monkeypatch.setattr("vitkit.training.accelerator.Accelerator", refuse)
    with pytest.raises(UsageError, match="accelerate refuses the launcher's settings: no such backend"):
        Run(tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_a_run_that_fails_before_its_first_step_says_so_in_a_directory_of_its_own(vitkit, tmp_path):
    failed = vitkit("run", "tiny.py", "--broken", "--out", "a")
    assert failed.returncode == 1
    assert summary_of(tmp_path / "a")["status"] == "failed"
    assert "failed: ArithmeticError: before the first step" in Path(tmp_path / "a" / "log.txt").read_text()
