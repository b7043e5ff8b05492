"""Results outlast the console: a closed pipe, an encoding without the characters, a full disk, and foreign text."""

import json
import os
import subprocess
import sys

import pytest
import torch

from vitkit import backbones, heads
from vitkit.cli.console import TextConsole, cell, flush_streams, prepare_streams, print_error
from vitkit.models.saving import save


@pytest.fixture
def model(tmp_path):
    """A directory `model` whose classes have names beyond Latin letters."""
    torch.manual_seed(0)
    modules = {
        "backbone": backbones.build("vit", img_size=8, in_chans=1, embed_dim=8, depth=1, num_heads=2),
        "classifier": heads.build("linear", in_dim=8, out_dim=10),
    }
    preprocessing = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "resize"}
    classes = ["猫", "é", "x\x1b[2J\x1b]52;c;AAAA\x07", "a\u202eb", *"456789"]
    save(tmp_path / "model", modules, preprocessing=preprocessing, classes=classes, arguments={})
    return tmp_path / "model"


def shell(line, tmp_path, **environment):
    """A line for bash, where `vitkit` is this environment's; the exit code is that of the last command that failed."""
    python = f"'{sys.executable}' -m vitkit"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("vitkit ", f"{python} ")],
        cwd=tmp_path, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


EVAL = "vitkit eval model --dataset digits --evaluator knn --arg train_size=200 -o scores.json"


def test_a_reader_that_closes_the_pipe_loses_no_file_and_gets_the_usual_exit_code(model, tmp_path):
    done = shell(f"{EVAL} | head -1", tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert "knn_top1" in json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr
    assert len(done.stdout.decode().splitlines()) == 1


@pytest.mark.parametrize("command", ["list", "--help", "data list", "show backbone vit", "doctor"])
def test_every_command_ends_quietly_when_nobody_reads(tmp_path, command):
    done = shell(f"vitkit {command} | true", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}])
def test_a_console_without_the_characters_loses_nothing(model, tmp_path, environment):
    done = shell(EVAL, tmp_path, **environment)
    assert done.returncode == 0, done.stderr.decode("latin-1")
    assert "knn_top1" in json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert b"knn_top1" in done.stdout
    assert b"+-" in done.stdout
    assert b"vitkit did not expect this error" not in done.stderr


def test_json_is_whole_on_a_console_without_the_characters(model, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "grün.png")
    done = shell("vitkit predict model *.png --json", tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")
    assert done.returncode == 0, done.stderr.decode("latin-1")
    (row,) = json.loads(done.stdout.decode("ascii"))
    assert row["image"] == "grün.png"
    assert "猫" in row["labels"]


def test_a_class_name_does_not_move_the_cursor_or_fill_the_clipboard(model, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "x\x1b[2J.png")
    done = shell("vitkit predict model *.png --top 10", tmp_path, LC_ALL="C.UTF-8")
    printed = done.stdout.decode() + done.stderr.decode()
    assert not set(printed) & set("\x1b\x07\u202e")
    assert r"x\x1b[2J\x1b]52;c;AAAA\x07 (" in printed
    assert r"a\u202eb (" in printed
    assert r"x\x1b[2J.png" in printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_an_error(tmp_path):
    done = shell("vitkit list > /dev/full", tmp_path)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_error_message_is_printed_without_markup_and_control_characters(capfd):
    print_error("no [bold]such[/] :smile: \x1b[2Jname\nsecond \x9bline")
    assert capfd.readouterr().err == "error: no [bold]such[/] :smile: \\x1b[2Jname\nsecond \\x9bline\n"


def test_text_is_no_markup(capfd):
    TextConsole().print("[red]x[/red] :bug:", cell("[b]\x07"))
    assert capfd.readouterr().out == "[red]x[/red] :bug: [b]\\x07\n"


def test_similar_characters_replace_those_that_cannot_be_encoded():
    code = "from vitkit.cli.console import prepare_streams; prepare_streams(); print('a → b × 3 … ≥ ┏━┓ 猫 \\udce9')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert printed.stdout.decode().split() == ["a", "->", "b", "x", "3", "...", ">=", "+-+", "?", "\\udce9"]


def test_streams_that_do_not_exist_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    prepare_streams()
    assert flush_streams()
    print_error("nobody reads this")
