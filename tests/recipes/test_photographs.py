"""From a folder of photographs to a classifier: the commands of the README, one after the other, on small composed pictures."""

import json
import re
import shlex
from pathlib import Path

import pytest
from photographs import write_objects
from PIL import Image

from vitkit.data import build
from vitkit.report import is_sheet

ROOT = Path(__file__).parents[2]
NAMES = ["null", "one", "two", "three", "four"]
SMALL = {
    "ssl_cifar10": "--method mae --embed-dim 32 --depth 1 --num-heads 2 --epochs 2 --eval-every 2 --batch-size 32 --eval-size 50",
    "finetune": "--epochs 6 --eval-every 3 --batch-size 16",
}


@pytest.fixture
def commands():
    """The words of each command in the README."""
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- shell: photographs -->\n```bash\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """photos/ without labels, labelled/ with a folder for each of five classes, and new/."""
    digits = build("digits").train
    for name, rows, labelled in (("photos", range(100, 160), False), ("labelled", range(160, 280), True), ("new", range(280, 283), False)):
        rows = [row for row in rows if not labelled or int(digits.labels[row]) < len(NAMES)]
        labels = [NAMES[int(digits.labels[row])] for row in rows] if labelled else None
        write_objects(tmp_path / name, digits.images[rows].numpy(), labels, seed=rows[0])
    (tmp_path / "new" / "img_0000.jpg").rename(tmp_path / "new" / "photo.jpg")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    return tmp_path


@pytest.mark.slow
def test_each_step_is_one_command(commands, folder, shell):
    printed = {}
    for program, *words in commands:
        assert program == "vitkit"
        recipe = Path(words[1]).stem
        done = shell(*words, *(SMALL[recipe].split() if words[0] == "run" else ()))
        assert done.returncode == 0, f"{words}: {done.stderr}"
        printed[" ".join(words[:3])] = done.stdout + done.stderr
    assert "left out: " in printed["data import photos/"]
    assert "photos: 48 + 12 images without labels" in printed["data import photos/"]
    assert "classes: the 5 folders in labelled" in printed["data import labelled/"]
    assert "start: the saved model runs/pretrained" in printed["run recipes/finetune.py --dataset"]
    assert "believe an accuracy between" in printed["run recipes/finetune.py --dataset"]
    assert "new/photo.jpg" in printed["predict runs/mine new/"]
    config = json.loads((folder / "runs" / "mine" / "config.json").read_text())
    assert sorted(config["classes"]) == sorted(NAMES)
    assert set(config["modules"]) == {"backbone", "classifier"}
    for name in ("nearest.png", "attention.png"):
        assert is_sheet(folder / name)
    with Image.open(folder / "attention.png") as sheet:
        assert sheet.height > 3 * 192
