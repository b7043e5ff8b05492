"""`vitkit attend` as a person types it: pictures of any size, models with and without attention, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit import backbones
from vitkit.models.saving import save
from vitkit.report import is_sheet

PREPARE = {"shape": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3, "fit": "resize"}


@pytest.fixture
def vitkit(tmp_path, shell):
    """`vitkit("attend", ...)` beside a model `vit` and a folder pictures/ of mixed sizes."""
    torch.manual_seed(0)
    backbone = backbones.build("vit", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, registers=1)
    save(tmp_path / "vit", {"backbone": backbone}, preprocessing=PREPARE, classes=["a", "b"], arguments={})
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index, (height, width) in enumerate(((9, 9), (70, 41), (33, 120))):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{index}.png")
    Image.new("L", (20, 30), 90).save(tmp_path / "grey.png")
    return shell


def columns_and_rows(path):
    """The number of pictures in a row of the sheet, and of rows, from its size: 192 pixels and a gap of 8 each."""
    with Image.open(path) as image:
        return (image.width - 8) // 200, (image.height - 8) // 200


def test_a_row_for_each_picture_of_any_size(vitkit, tmp_path):
    done = vitkit("attend", "vit", "pictures", "grey.png", "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out.png: 4 pictures; the saved model vit; 4×4 patches, 2 other tokens, from the CLS token\n"
    assert is_sheet(tmp_path / "out.png")
    assert columns_and_rows(tmp_path / "out.png") == (6, 4)  # picture, tokens, last block, rollout, two heads
    before = (tmp_path / "out.png").read_bytes()
    assert vitkit("attend", "vit", "pictures", "grey.png", "-o", "out.png").returncode == 0
    assert (tmp_path / "out.png").read_bytes() == before


def test_the_first_pictures_of_a_folder_or_dataset_and_broken_ones_are_named(vitkit, tmp_path):
    (tmp_path / "pictures" / "0.png").write_bytes(b"")
    done = vitkit("attend", "vit", "pictures", "--count", "1")
    assert (done.returncode, done.stdout.split(";")[0]) == (0, "attention.png: 1 picture of 3")
    assert "left out: pictures/0.png cannot be read as an image" in done.stderr
    done = vitkit("attend", "vit", "digits", "--count", "2")
    assert done.stdout.startswith("attention.png: 2 pictures of 382; ")


def test_windows_give_colours_and_a_reason(vitkit, tmp_path):
    done = vitkit("attend", "timm/swin_tiny_patch4_window7_224", "grey.png", "--weights", "none", "--img-size", "448", "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert "the last block of TimmBackbone attends within windows" in done.stderr
    assert "the colours of its tokens remain" in done.stderr
    assert columns_and_rows(tmp_path / "out.png")[0] <= 4


def test_a_registered_backbone_without_a_cls_token(vitkit):
    done = vitkit("attend", "timm/test_vit2", "grey.png", "--weights", "none", "--img-size", "64")
    assert done.returncode == 0, done.stderr
    assert "random weights of timm/test_vit2" in done.stdout


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("vit pictures -o out.jpg", "--out out.jpg: the file is a PNG; give a name that ends in .png"),
        ("vit pictures --count 0", "--count is 0; expected at least 1"),
        ("vit pictures -o pictures/1.png", "--out pictures/1.png exists and is not an image that vitkit drew"),
        ("vit nowhere.png", "no image at nowhere.png"),
        ("vit pictures --img-size 32", "vit is a saved model: it has its own size and weights; leave img_size=32 out"),
        ("vitt pictures", "no model at vitt: it is neither a directory, nor a registered backbone; did you mean 'vit'?"),
        ("timm/test_vit pictures --weights no.pth", "--weights no.pth: no such file; expected auto, none, or a file of weights"),
        ("bare pictures", "bare was saved without preprocessing, so the size of its images is unknown"),
        ("vit broken.png", "none of the pictures can be read"),
    ],
)
def test_mistakes_are_answered(line, text, vitkit, tmp_path):
    save(tmp_path / "bare", {"backbone": backbones.build("vit", img_size=16, embed_dim=16, depth=1, num_heads=2)},
         preprocessing={}, classes=[], arguments={})  # fmt: skip
    (tmp_path / "broken.png").write_bytes(b"no image")
    done = vitkit("attend", *line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert not (tmp_path / "attention.png").exists()
