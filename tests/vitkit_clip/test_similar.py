"""`vitkit search` by an image, with a backbone of single images: what is nearest by brute force, in folders and datasets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vitkit
from vitkit import backbones, heads
from vitkit.data import build
from vitkit.models import saving

DIGITS = [str(digit) for digit in range(10)]
PREPARE = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "resize"}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    backbone = backbones.build("vit", img_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=2)
    extra = {"dataset": "digits"}
    saving.save(tmp_path / "run", {"backbone": backbone}, preprocessing=PREPARE, classes=DIGITS, arguments={}, extra=extra)
    saving.save(tmp_path / "bare", {"backbone": backbone}, preprocessing={}, classes=[], arguments={})
    saving.save(tmp_path / "heads", {"classifier": heads.build("linear", in_dim=8, out_dim=2)}, preprocessing=PREPARE,
                classes=["a", "b"], arguments={})  # fmt: skip
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index, (height, width) in enumerate(((9, 9), (40, 21), (33, 70), (8, 8))):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{index}.png")
    return vitkit.load(tmp_path / "run")


def test_the_images_of_a_folder_that_are_nearest_come_first(saved, tmp_path, shell):
    (tmp_path / "pictures" / "broken.png").write_bytes(b"")
    done = shell("search", "run", "pictures/2.png", "--folder", "pictures", "--count", "3")
    assert done.returncode == 0, done.stderr
    features = F.normalize(saved.embed([str(tmp_path / "pictures" / f"{index}.png") for index in range(4)]), dim=1)
    order = (features[2] @ features.T).argsort(descending=True)[:3].tolist()
    lines = [line for line in done.stdout.splitlines() if ".png" in line and "│" in line]
    assert [line.split("│")[3].strip() for line in lines] == [f"{index}.png" for index in order]
    assert order[0] == 2
    assert "1.0000" in lines[0]
    assert "left out: " in done.stdout
    assert "search.png: 4 images" in done.stdout


def test_the_test_images_of_the_training_or_of_another_dataset(saved, tmp_path, shell):
    image = build("digits").test.images[7, 0]
    Image.fromarray(image.numpy()).save(tmp_path / "query.png")
    done = shell("search", "run", "query.png", "--count", "2", "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert "nearest in digits" in done.stdout
    assert f"{int(build('digits').test.labels[7])} #7" in done.stdout
    assert shell("search", "run", "query.png", "--dataset", "digits", "--among", "5", "-o", "out.png").returncode == 0


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("run a_caption", "comparing images with captions needs a model with a 'backbone' and a 'text'"),
        ("bare pictures/0.png --folder pictures", "a backbone and its preprocessing; this one was saved without preprocessing"),
        ("heads pictures/0.png --folder pictures", "this one was saved without a module named 'backbone'"),
        ("run pictures/0.png --folder nowhere", "there is no folder nowhere; give one that holds images"),
    ],
)
def test_mistakes_are_answered(line, text, saved, shell):
    done = shell("search", *line.split())
    assert done.returncode == 2
    assert text in done.stderr
