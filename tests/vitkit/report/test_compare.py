"""Runs side by side: what differs, what is best, what cannot be compared, and clear answers to bad input."""

import base64
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vitkit.cli.compare import compare
from vitkit.errors import RunError, UsageError
from vitkit.report.comparison import read_runs


@pytest.fixture
def two(make_run):
    last = {"loss": 0.05, "linear_top1": 0.98, "m1_top1": 0.85}
    return [
        make_run("a"),
        make_run("b", seed=1, arguments={"epochs": 6, "lr": 3e-4, "label_fraction": None}, final=last),
    ]


def rows(printed):
    """The cells of a printed table's lines by their first one."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {line[0]: line[1:] for line in lines}


def test_the_terminal_shows_what_differs_and_results_against_the_first_run(two, tmp_path, capsys):
    compare(two, tmp_path / "compare.html")
    printed = capsys.readouterr().out
    table = rows(printed)
    assert table["lr"] == ["0.001", "0.0003"]
    assert table["seed"] == ["0", "1"]
    assert "label_fraction" not in table
    assert "precision" not in table
    assert table["linear_top1"] == ["0.9551", "0.9800 (+0.0249)"]
    assert table["m1_top1"] == ["0.8502", "0.8500 (−0.0002)"]
    assert table["epochs"] == ["6", "6"]
    assert table["parameters"] == ["2,745,856", "2,745,856"]
    assert "note:" not in printed
    assert f"page: {tmp_path / 'compare.html'}" in printed


def test_the_best_of_a_row_is_told_by_what_is_measured(two):
    results = {row.name: row for row in read_runs(two).results}
    assert results["linear_top1"].best == [False, True]
    assert results["m1_top1"].best == [True, False]
    assert results["loss"].best == [True, False]  # 0.0498 and 0.05: less is better
    assert results["seconds"].best == [False, False]  # equal
    assert results["parameters"].best == [False, False]
    assert results["linear_top1"].gains[1] == pytest.approx(0.0249, abs=1e-4)
    assert results["loss"].gains[1] < 0
    assert np.isnan(results["m1_top1"].gains[0])


def test_page_and_sheet_show_every_column_once(two, tmp_path):
    compare(two, tmp_path / "sub" / "page.html")
    page = (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    with Image.open(tmp_path / "sub" / "page.png") as sheet:
        assert sheet.size == (1665, 870)  # six panels: linear, m1 twice, loss, invariance, sigreg
    pictures = page.split("data:image/png;base64,")[1:]
    assert len(pictures) == 6
    Image.open(io.BytesIO(base64.b64decode(pictures[0].split('"')[0]))).verify()
    assert 'alt="linear top-1 over epochs, last values: a 0.9551, b 0.9551."' in page
    assert "<b>0.9800</b>" in page
    assert "<script" not in page


def test_runs_with_different_metrics_and_data_unfinished_ones_and_missing_tables(make_run, tmp_path, capsys):
    one = make_run("one", metrics=[{"epoch": 2, "linear_top1": 0.9}, {"epoch": 4, "linear_top1": 0.93}])
    data = {"name": "digits", "fallback_for": "mnist"}
    two = make_run("two", metrics=[{"epoch": 3, "m2_top1": 0.5}], status="interrupted", dataset=data)
    three = make_run("three", status="running", final={})
    (three / "metrics.csv").unlink()
    (three / "losses.csv").unlink()
    four = make_run("four")
    (four / "summary.json").unlink()
    compare([one, two, three, four], tmp_path / "compare.html")
    printed = capsys.readouterr().out
    table = rows(printed)
    assert table["status"] == ["finished", "interrupted", "stopped", "unknown"]
    assert table["linear_top1"] == ["0.9300", "–", "–", "0.9551 (+0.0251)"]
    assert table["m2_top1"] == ["–", "0.5000", "–", "–"]
    assert table["dataset"] == ["mnist", "digits", "mnist", "–"]
    assert table["instead of"] == ["–", "mnist", "–", "–"]
    for note in (
        "The runs used different data (one: mnist, two: digits, three: mnist, four: unknown): their results cannot be",
        "two has not finished (interrupted): its last evaluation is of epoch 3.",
        "three has not finished (stopped): it has no evaluation yet.",
    ):
        assert note in printed
        assert note in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_measurements_that_differ_are_named(two):
    summary = json.loads((two[1] / "summary.json").read_text())
    summary["protocols"]["m1_top1"]["samples"] = 500
    (two[1] / "summary.json").write_text(json.dumps(summary))
    assert read_runs(two).warnings == ["Not measured in the same way in all runs: m1_top1; see the reports of the runs."]


def test_runs_of_the_same_name_are_told_apart(make_run):
    runs = [make_run("depth3/run"), make_run("depth6/run"), make_run("[bold]/run")]
    assert read_runs(runs).names == ["depth3/run", "depth6/run", "[bold]/run"]
    assert read_runs([runs[0], make_run("other")]).names == ["run", "other"]


def test_names_that_are_markup_are_shown_as_they_are(make_run, tmp_path, capsys):
    runs = [make_run(name, losses=[], metrics=[]) for name in ("[bold]a", "<i>b")]
    compare(runs, tmp_path / "compare.html")
    assert "[bold]a" in capsys.readouterr().out
    assert "<i>" not in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_runs_without_tables_still_give_a_page(make_run, tmp_path, capsys):
    compare([make_run("a", losses=[], metrics=[]), make_run("b", losses=[], metrics=[])], tmp_path / "compare.html")
    printed = capsys.readouterr().out
    assert "a holds no evaluation." in printed
    assert "curves" not in printed
    assert not (tmp_path / "compare.png").exists()
    assert "No argument, setting or version differs." in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_what_holds_no_run_is_refused_with_a_way_out(make_run, tmp_path):
    run = make_run("runs/one")
    (tmp_path / "empty").mkdir()
    broken = make_run("broken")
    (broken / "summary.json").write_text("{")
    garbled = make_run("garbled")
    (garbled / "losses.csv").write_bytes(b"\xff\xff")
    page = tmp_path / "compare.html"
    for directories, text in (
        ([run], "compare takes at least two runs; got .*one"),
        ([run, tmp_path / "nowhere"], "no run at .*nowhere: the directory does not exist"),
        ([run, run / "summary.json"], "summary.json is a file; give the run's directory, .*one"),
        ([run, tmp_path / "empty"], "empty holds no run: summary.json, losses.csv and metrics.csv are missing$"),
        ([run, tmp_path / "runs"], "runs holds no run: .* are missing; it holds runs: .*one"),
        ([run, broken], "cannot read .*broken.summary.json: it is not a run's summary"),
        ([run, garbled], "cannot read .*garbled.losses.csv"),
        ([run, run / ".." / "one"], "is given twice; compare takes different runs"),
    ):
        with pytest.raises(UsageError, match=text):
            compare(directories, page)
    assert not page.exists()


def test_a_page_that_cannot_be_written_is_answered(two, tmp_path):
    for name in ("compare.png", "compare", "."):
        with pytest.raises(UsageError, match=r"--out .*: expected the name of a page, such as compare.html"):
            compare(two, tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file.compare.png: (Not a directory|File exists)"):
        compare(two, tmp_path / "file" / "compare.html")


def test_only_files_of_an_earlier_comparison_are_replaced_without_being_asked_to(two, tmp_path):
    page, sheet = tmp_path / "compare.html", tmp_path / "compare.png"
    compare(two, page)
    compare(two, page)  # its own files
    for path, content in ((page, b"<p>my notes</p>"), (sheet, b"\x89PNG my image")):
        earlier = {page: page.read_bytes(), sheet: sheet.read_bytes()}
        path.write_bytes(content)
        with pytest.raises(UsageError) as refusal:
            compare(two, page)
        assert str(refusal.value) == (
            f"{path} exists and was not written by vitkit compare; choose another --out, or give --overwrite to replace it"
        )
        assert path.read_bytes() == content
        assert all(other.read_bytes() == data for other, data in earlier.items() if other != path)
        compare(two, page, overwrite=True)
        assert b"vitkit compare" in path.read_bytes()[:1024]


def test_the_page_is_written_before_the_terminal_is_used(two, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("rich.console.Console.print", closed)
    with pytest.raises(BrokenPipeError):
        compare(two, tmp_path / "compare.html")
    assert (tmp_path / "compare.html").exists()


def test_the_better_of_two_values_follows_the_recorded_direction_and_units_are_shown(make_run, tmp_path, capsys):
    def protocols(direction, unit=""):
        return {"rank": {"direction": direction, "unit": unit, "split": "test"}, "val_rank": {"direction": direction, "split": "val"}}

    final = [{"rank": 9.0, "val_rank": 8.0, "top1": 0.1}, {"rank": 4.0, "val_rank": 3.0, "top1": 0.2}]
    runs = [make_run(n, metrics=[], final=f, protocols=protocols("min", "places")) for n, f in zip("ab", final, strict=True)]
    results = {row.name: row for row in read_runs(runs).results}
    assert results["rank"].best == [False, True]
    assert results["rank"].gains[1] == 5.0
    assert results["top1"].best == [False, True]
    assert list(results)[:3] == ["rank", "val_rank", "top1"]
    compare(runs, tmp_path / "compare.html")
    assert rows(capsys.readouterr().out)["rank"] == ["9.0000 places", "4.0000 places (−5.0000)"]


def test_control_characters_do_not_reach_the_terminal(make_run, tmp_path, capsys):
    runs = [make_run("a"), make_run("b", recipe="x\x1b[2Jy", arguments={"k\x1b]0;": "\x07"})]
    compare(runs, tmp_path / "compare.html")
    assert not {"\x1b", "\x07"} & set(capsys.readouterr().out)


def test_importing_the_command_imports_neither_torch_nor_matplotlib():
    code = "import sys, vitkit.cli.compare; print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_comparing_imports_no_torch(two, tmp_path):
    code = (
        "import sys; from pathlib import Path; from vitkit.cli.compare import compare;"
        f"compare([Path({str(two[0])!r}), Path({str(two[1])!r})], Path({str(tmp_path / 'c.html')!r}));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
