"""Directions and best values come from protocols; a summary is checked before it is used; rows become CSV."""

import csv
import json
import subprocess
import sys

import pytest

from vitkit.errors import UsageError
from vitkit.runs.summary import best_of, direction, validate_summary, write_csv

RANK = {"median_rank": {"direction": "min"}}


def test_the_direction_of_a_metric_is_the_recorded_one_whatever_its_name():
    protocols = {"loss_of_trust": {"direction": "max"}, "quality": {"kind": "error"}, "cost": {"direction": "min"}, "odd": "max"}
    assert {name: direction(name, protocols) for name in ("loss_of_trust", "quality", "cost", "odd")} == {
        "loss_of_trust": "max", "quality": "min", "cost": "min", "odd": "max",
    }  # fmt: skip
    assert direction("reconstruction_mse", {}) == "max"  # an older run without a record
    assert direction("loss", {}) == "min"


def test_the_best_is_the_first_of_the_best_values_and_missing_ones_do_not_count():
    rows = [
        {"epoch": 1, "step": 10, "knn_top1": 0.5, "median_rank": 9.0},
        {"epoch": 2, "step": 20, "knn_top1": 0.7, "median_rank": None},
        {"epoch": 3, "step": 30, "knn_top1": 0.7, "median_rank": 4.0},
    ]
    assert best_of(rows, RANK) == {"knn_top1": {"value": 0.7, "epoch": 2}, "median_rank": {"value": 4.0, "epoch": 3}}


def test_what_is_not_finite_is_never_best():
    nan, inf = float("nan"), float("inf")
    rows = [{"epoch": n, "top1": a, "loss": b, "lost": nan} for n, a, b in ((1, nan, inf), (2, 0.2, nan), (3, inf, 0.5), (4, 0.1, -inf))]
    assert best_of(rows, {}) == {"top1": {"value": 0.2, "epoch": 2}, "loss": {"value": 0.5, "epoch": 3}}


def test_rows_are_written_under_all_their_columns(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "knn": 0.25}])
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"epoch": "1", "loss": "0.5", "knn": ""},
            {"epoch": "2", "loss": "", "knn": "0.25"},
        ]


def test_a_summary_as_the_runner_writes_it_passes(make_run):
    summary = json.loads((make_run() / "summary.json").read_text())
    assert validate_summary(summary) == summary
    assert validate_summary({}) == {}
    assert validate_summary({"recipe": "my recipe (1)", "final": {"top1": None}, "of_tomorrow": [1]})["recipe"] == "my recipe (1)"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"recipe": "../../x"}, "recipe is '../../x'; expected the name of a recipe: letters, digits, spaces and ._()+- without a path"),
        ({"recipe": "a\\b"}, r"recipe is 'a\\\\b'; expected the name of a recipe"),
        ({"recipe": ".."}, "recipe is '..'; expected the name of a recipe"),
        ({"recipe": ".ssh"}, "recipe is '.ssh'; expected the name of a recipe"),
        ({"recipe": "a\x1b[2J"}, r"recipe is 'a\x1b[2J'; expected the name of a recipe"),
        ({"recipe": "x" * 300}, "expected the name of a recipe"),
        ({"recipe": 7}, "recipe is 7; expected the name of a recipe"),
        ({"status": ["finished"]}, "status is ['finished']; expected a text"),
        ({"final": 3}, "final is 3; expected a mapping of names to values"),
        ({"final": {"top1": "0.9"}}, "final.top1 is '0.9'; expected a finite number"),
        ({"final": {"top1": True}}, "final.top1 is True; expected a finite number"),
        ({"seconds": "long"}, "seconds is 'long'; expected a finite number"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number"),
        ({"settings": {"threads": 10**9}}, "settings.threads is 1000000000; expected a whole number from 1 to 4096"),
        ({"settings": {"grad_accum": -1}}, "settings.grad_accum is -1; expected a whole number that is not negative"),
        ({"settings": []}, "settings is []; expected a mapping of names to values"),
        ({"requested": "seed"}, "requested is 'seed'; expected a mapping"),
        ({"arguments": [["lr", 1]]}, "arguments is [['lr', 1]]; expected a mapping"),
        ({"dataset": {"classes": [1]}}, "dataset.classes is [1]; expected a list of texts"),
        ({"protocols": {"top1": {"samples": "many"}}}, "protocols.top1.samples is 'many'; expected a whole number"),
        ({"protocols": {"top1": {"direction": "up"}}}, "protocols.top1.direction is 'up'; expected max or min"),
        ({"references": {"paper": {"top1": "0.9"}}}, "references.paper.top1 is '0.9'; expected a finite number"),
        ({"versions": {"torch": 2}}, "versions.torch is 2; expected a text"),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_name(fields, text):
    with pytest.raises(UsageError) as refusal:
        validate_summary(fields, "runs/x/summary.json")
    assert str(refusal.value).startswith("runs/x/summary.json: ")
    assert text.replace(r"\\\\", r"\\") in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_the_format_of_a_run_is_read_without_torch():
    program = "import sys, vitkit.runs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
