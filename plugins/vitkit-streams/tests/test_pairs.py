"""Pairs of pictures that are streamed: nothing is lost or read twice, for any number of ranks, from any batch on."""

import csv
import io
import os
import signal

import datasets as hf
import numpy as np
import pytest
import torch
from PIL import Image

from vitkit import datasets
from vitkit_clip import PairRetrieval, Pairs
from vitkit_streams.writing import write_shards

FLAGS = ("--preset", "baseline", "--epochs", "1", "--batch-size", "32", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def data(shards):
    """The training pictures, whose classes are their numbers modulo four, in eight shards."""

    def build(**options):
        return datasets.build("webdataset", **{
            "urls": str(shards), "test_urls": str(shards), "test_size": 4, "img_size": 8, "channels": 1,
            "cache": str(shards.parent / "cache"), "workers": 2, "val_size": 0, **options,
        })  # fmt: skip

    return build


def seen(data, batch):
    """The numbers `(b 2)` of a batch's pictures, by their grey values."""
    values = batch["images"][:, 0, 0, [0, 8]] * data.std[0] + data.mean[0]
    return (values * 255).round().long()


def test_pairs_of_shards_show_what_their_labels_say(data):
    found = data(shuffle_buffer=20, open_shards=4)
    pairs = Pairs(found.train, found.classes, 16, different=0.5)
    different = []
    for number in range(8):
        batches = list(pairs.epoch(number, seed=1))
        pictures = torch.cat([seen(found, batch) for batch in batches])
        left, right = (torch.cat([batch[side] for batch in batches]) for side in ("left", "right"))
        assert sorted(pictures[:, 0].tolist()) == list(range(80))
        assert torch.equal(pictures % 4, torch.stack([left, right], dim=1))
        assert (pictures[:, 0] != pictures[:, 1]).all()
        different.append((left != right).float().mean())
    assert float(torch.stack(different).mean()) == pytest.approx(0.5, abs=0.05)


def test_pairs_are_the_same_from_any_batch_on_and_for_two_ranks(data):
    found = data(shuffle_buffer=20, open_shards=4)
    pairs = Pairs(found.train, found.classes, 16)
    whole = list(pairs.epoch(2, seed=1))
    again = data(shuffle_buffer=20, open_shards=4)
    for one, other in zip(whole[3:], Pairs(again.train, again.classes, 16).epoch(2, seed=1, start=3), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    halves = [list(Pairs(again.train, again.classes, 8).epoch(2, seed=1, rank=rank, world=2)) for rank in range(2)]
    for one, *parts in zip(whole, *halves, strict=True):
        assert all(torch.equal(torch.cat([part[name] for part in parts]), one[name]) for name in one)


def test_pairs_are_read_from_few_shards_at_a_time(tmp_path):
    write_shards(tmp_path / "many", [np.full((4, 4), n % 250, dtype=np.uint8) for n in range(400)], [n % 2 for n in range(400)],
                 per_shard=10)  # fmt: skip
    common = {"urls": str(tmp_path / "many"), "test_size": 4, "img_size": 4, "channels": 1, "cache": str(tmp_path / "cache")}

    def shards_of_a_batch(**options):
        train = datasets.build("webdataset", **common, **options).train
        drawn = torch.stack(Pairs(train, ["even", "odd"], 8).drawn(), dim=1)
        return [len((train.images.rows[part.flatten()] // 10).unique()) for part in drawn.split(8)]

    near, far = shards_of_a_batch(shuffle_buffer=8, open_shards=2), shards_of_a_batch(shuffle_buffer=400, open_shards=2)
    assert max(near) <= 8  # 24 places, in two lanes
    assert np.mean(near) < 0.5 * np.mean(far)


@pytest.fixture
def few_pairs(monkeypatch):
    """Evaluated on few pairs: 10,000 take most of the time."""
    monkeypatch.setitem(PairRetrieval.__init__.__kwdefaults__, "count", 500)


@pytest.mark.slow
@pytest.mark.usefixtures("few_pairs")
def test_clip_trains_on_shards_and_goes_on_bit_for_bit(digits, train, tmp_path, monkeypatch):
    import vitkit_streams.images as images

    flags = ("--dataset", "webdataset", *digits, *FLAGS)
    whole = train("clip_cifar100.py", tmp_path / "whole", *flags)
    assert (whole["status"], whole["dataset"]["name"], whole["steps"]) == ("finished", "webdataset", 6)
    assert whole["final"]["left_top1"] > 0.15  # chance is 0.1
    assert "left out because they cannot be read: 1 (" in (tmp_path / "whole" / "log.txt").read_text()
    decoded, original = [], images.decode

    def stopping(*arguments):
        decoded.append(1)
        if len(decoded) == 500:  # 300 to begin with, and then about 56 a batch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", stopping)
        train("clip_cifar100.py", tmp_path / "cut", *flags, code=130)
    resumed = train("clip_cifar100.py", tmp_path / "cut", "--resume")
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert resumed["final"] == whole["final"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_pairs")
def test_clip_trains_on_an_arrow_table(train, tmp_path):
    rows = {"image": [], "label": []}
    some = datasets.build("digits").train.stratified_subset(200)
    for image, label in zip(some.images[:, 0].numpy(), some.labels.tolist(), strict=True):
        body = io.BytesIO()
        Image.fromarray(image).save(body, "PNG")
        rows["image"].append({"bytes": body.getvalue(), "path": None})
        rows["label"].append(label)
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list("0123456789"))})
    hf.disable_progress_bars()
    hf.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    words = {"path": tmp_path / "table", "img_size": 16, "channels": 1}
    given = [word for name, value in words.items() for word in ("--dataset-arg", f"{name}={value}")]
    summary = train("clip_cifar100.py", tmp_path / "run", "--dataset", "hf_dataset", *given, *FLAGS)
    assert (summary["status"], summary["dataset"]["train"], summary["dataset"]["test"], summary["steps"]) == ("finished", 144, 40, 4)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
