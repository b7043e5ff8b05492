"""What streams out of the splits: every sample once, shuffled, the same for any number of ranks, from any batch on."""

import io
import os
import re
import signal
import struct
import threading
import zlib
from itertools import groupby
from pathlib import Path

import datasets as hf
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from vitkit import datasets
from vitkit.contracts import LazyImages
from vitkit.data import ImageSplit, Preprocessing
from vitkit.errors import DatasetError, UsageError
from vitkit_streams.images import decode
from vitkit_streams.writing import write_shards


def png(value: int = 0, side: int = 8) -> bytes:
    body = io.BytesIO()
    Image.fromarray(np.full((side, side), value, dtype=np.uint8)).save(body, "PNG")
    return body.getvalue()


def build(shards, **options):
    common = {"urls": str(shards), "img_size": 8, "channels": 1, "cache": str(shards.parent / "cache"), "workers": 2, "val_size": 0}
    return datasets.build("webdataset", **common | options)


def numbers(data, batch, split="train"):
    """Which pictures a batch holds, by their grey value."""
    preprocessing = getattr(data, split).preprocessing
    values = batch["images"][:, 0, 0, 0] * preprocessing.std[0] + preprocessing.mean[0]
    return [round(float(value) * 255) for value in values]


def ordered(images, seed, size):
    return images.order(torch.Generator().manual_seed(seed), size)


def flat(lists):
    return [item for items in lists for item in items]


def epoch(data, size=8, number=0, **options):
    batches = data.train.batches(size, shuffle=True)
    return [numbers(data, batch) for batch in batches.epoch(number, seed=3, **options)]


def test_train_and_test_share_no_picture_and_hold_all(shards):
    data = build(shards, test_size=12)
    train = sorted(flat(epoch(data)))
    test = sorted(data.test.images[:, 0, 0, 0].tolist())
    assert len(test) == 12
    assert data.test.labels.bincount().tolist() == [3, 3, 3, 3]
    assert sorted(train + test) == list(range(80))
    assert isinstance(data.train.images, LazyImages)
    assert isinstance(data.test.images, torch.Tensor)
    for batch in data.train.batches(8).epoch(0):
        assert [number % 4 for number in numbers(data, batch)] == batch["labels"].tolist()


def test_validation_images_come_off_the_training_images_and_are_in_memory(shards):
    data = build(shards, test_size=12, val_size=None)
    assert data.val_note == "6 of 68 training images, stratified, seed 0"
    assert isinstance(data.val.images, torch.Tensor)
    train, val, test = sorted(flat(epoch(data))), *(split.images[:, 0, 0, 0].tolist() for split in (data.val, data.test))
    assert (len(val), sorted(train + val + test)) == (6, list(range(80)))
    assert [number % 4 for number in val] == data.val.labels.tolist()
    assert len(build(shards, val_size=9).val) == 9


def test_a_test_split_of_its_own_is_capped(shards):
    write_shards(shards / "held", [np.full((8, 8), 200 + n, dtype=np.uint8) for n in range(9)], [n % 3 for n in range(9)])
    data = build(shards, test_urls=str(shards / "held"), test_size=6)
    assert len(data.train) == 80
    assert sorted(set(data.test.images.flatten().tolist())) == sorted(data.test.images[:, 0, 0, 0].tolist())
    assert min(data.test.images.flatten().tolist()) >= 200
    assert data.test.labels.bincount().tolist() == [2, 2, 2]


def test_epochs_are_shuffled_and_depend_on_seed_and_number_alone(shards):
    data = build(shards)
    first = flat(epoch(data))
    assert first == flat(epoch(build(shards)))
    assert first != flat(epoch(data, number=1))
    plain = flat(numbers(data, batch) for batch in data.train.batches(8).epoch(0))
    assert plain == sorted(plain)


def test_shards_are_read_one_after_another_or_side_by_side(shards):
    calm = build(shards, shuffle_buffer=0, open_shards=1).train.images
    order = ordered(calm, 7, 1)
    assert sorted(order.tolist()) == list(range(len(calm)))
    rows = calm.rows[order].tolist()
    turns = [shard for shard, _ in groupby(row // 10 for row in rows)]
    assert sorted(turns) == list(range(8))  # each shard in one piece
    assert turns != sorted(turns)
    for _, within in groupby(rows, lambda row: row // 10):
        assert (found := list(within)) == sorted(found)
    wide = build(shards, test_urls=str(shards), open_shards=8).train.images
    for batch in wide.rows[ordered(wide, 7, 8)].split(8):
        assert len({int(row) // 10 for row in batch}) == 8  # a batch of eight takes from every shard


def test_a_sample_moves_by_less_than_the_buffer(shards):
    calm, mixed = (ordered(build(shards, shuffle_buffer=size, open_shards=1).train.images, 5, 1).tolist() for size in (0, 12))
    place = {row: place for place, row in enumerate(calm)}
    moved = [place[row] - now for now, row in enumerate(mixed)]
    assert sorted(calm) == sorted(mixed)
    assert sum(map(bool, moved)) > len(moved) / 2
    assert max(map(abs, moved)) < 12


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_batch_of_one_process_and_read_different_shards(shards, world):
    data = build(shards, test_urls=str(shards), test_size=4)
    whole = epoch(data, size=16)
    parts = [epoch(data, size=16 // world, rank=rank, world=world) for rank in range(world)]
    for index, batch in enumerate(whole):
        assert sorted(flat(part[index] for part in parts)) == batch
    shards_of = [{number // 10 for batch in part for number in batch} for part in parts]
    assert sum(map(len, shards_of)) == 8  # eight lanes of a shard each, and none is read by two


def test_an_epoch_can_be_entered_anywhere(shards):
    data = build(shards)
    whole = epoch(data)
    for start in (1, 5, len(whole)):
        assert epoch(build(shards), start=start) == whole[start:]


def test_an_epoch_left_early_leaves_no_thread_behind(shards):
    before = threading.active_count()
    stream = build(shards).train.batches(8).epoch(0)
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name.startswith("vitkit-streams"):
            thread.join(timeout=10)
    assert threading.active_count() == before


@pytest.fixture
def damaged(shards):
    """The same with three pictures replaced: text, half a picture, and one that would unpack to gigabytes."""
    from webdataset.writer import TarWriter

    body = png()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + body[24:29]
    huge = body[:12] + header + struct.pack(">I", zlib.crc32(header)) + body[33:]
    with TarWriter(str(shards / "train-000099.tar")) as writer:
        for key, body in (("text", b"no picture"), ("half", png(1, 64)[:45]), ("huge", huge), ("good", png(90))):
            writer.write({"__key__": key, "png": body, "cls": b"1"})
    return shards


def test_pictures_that_cannot_be_decoded_are_left_out_and_named(damaged):
    data = build(damaged, test_urls=str(damaged / "train-000000.tar"))
    batches = data.train.batches(7, shuffle=True)
    for number in range(2):
        found = list(batches.epoch(number, seed=1))
        pictures = flat(numbers(data, batch) for batch in found)
        assert sorted(pictures) == [*range(80), 90]
        assert all(len(batch["labels"]) == len(batch["images"]) for batch in found)
        labels = torch.cat([batch["labels"] for batch in found]).tolist()
        assert labels == [1 if picture == 90 else picture % 4 for picture in pictures]
    skipped = sorted(batches.skipped)
    assert len(skipped) == 3
    assert [line.split(": ")[1] for line in skipped] == ["half", "huge", "text"]
    assert "pixels" in skipped[1]
    assert "cannot identify image file" in skipped[2]
    assert "b'no picture'" not in skipped[2]
    with pytest.raises(DatasetError, match="train-000099.tar: .* requested by its number and cannot be left out"):
        data.train.images.index_select(0, torch.arange(80, 84))


def test_pictures_left_out_of_the_test_split_are_in_the_notice(damaged):
    data = build(damaged, urls=f"{damaged}/train-00000{{0..7}}.tar", test_urls=f"{damaged}/train-000099.tar")
    assert data.test.images[:, 0, 0, 0].tolist() == [90]
    assert len(data.skipped) == 3
    assert data.notice.startswith("3 images are left out: ")


def test_a_stream_without_a_readable_picture(tmp_path):
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(6):
            writer.write({"__key__": str(number), "png": b"nothing", "cls": str(number % 2).encode()})
    with pytest.raises(DatasetError, match="none of 5 images of webdataset can be read: .*a.tar: 0: UnidentifiedImageError"):
        build(tmp_path, urls=str(tmp_path / "a.tar"), cache=str(tmp_path / "cache"))


def test_subsets_stay_unread_and_hidden_labels_and_repeats_work(shards):
    data = build(shards)
    some = data.train.stratified_subset(10)
    assert isinstance(some.images, LazyImages)
    assert some.images.shape == (10, 1, 8, 8)
    shown = data.train.mask_labels(0.25).oversample_labelled(0.5)
    assert isinstance(shown.images, LazyImages)
    assert len(shown) > len(data.train)
    loaded = some.in_memory()
    assert torch.equal(loaded.images, some.images.index_select(0, torch.arange(10)))
    assert loaded.in_memory() is loaded


def test_moments_are_those_of_the_pictures(shards):
    data = build(shards, test_urls=str(shards))
    values = torch.arange(80) / 255
    assert data.mean == pytest.approx((float(values.mean()),), abs=1e-6)
    assert data.std == pytest.approx((float(values.std(correction=0)),), abs=1e-6)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match="9×9 pixels are more than the 50"):
        decode(png(side=9), 4, 1)


def test_decoding_crops_and_converts():
    body = io.BytesIO()
    Image.fromarray(np.full((10, 20, 3), (200, 100, 50), dtype=np.uint8)).save(body, "PNG")
    rgb, grey = decode(body.getvalue(), 6, 3), decode(body.getvalue(), 6, 1)
    assert rgb.shape == (3, 6, 6)
    assert rgb[:, 0, 0].tolist() == [200, 100, 50]
    assert grey.shape == (1, 6, 6)
    assert int(grey[0, 0, 0]) == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)


@pytest.fixture
def table(tmp_path):
    """The 80 pictures as an arrow table, in a folder."""
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(80)], "label": [n % 4 for n in range(80)]}
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["n", "e", "s", "w"])})
    hf.disable_progress_bars()
    splits = {"train": hf.Dataset.from_dict(rows, features=features)}
    splits["test"] = splits["train"].select(range(8))
    splits["text"] = splits["train"].map(lambda row: {"label": "nesw"[row["label"]]}, features=hf.Features(
        {"image": hf.Image(), "label": hf.Value("string")}))  # fmt: skip
    hf.DatasetDict(splits).save_to_disk(str(tmp_path / "table"))
    return tmp_path / "table"


def test_an_arrow_table_streams_as_shards_do(table):
    data = datasets.build("hf_dataset", path=str(table), img_size=8, channels=1, workers=2, val_size=0)
    assert data.classes == ["n", "e", "s", "w"]
    assert len(data.test) == 8
    whole = epoch(data)
    assert sorted(flat(whole)) == list(range(80))
    halves = [epoch(data, size=4, rank=rank, world=2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == whole
    assert epoch(data, start=4) == whole[4:]
    named = datasets.build("hf_dataset", path=str(table), split="text", img_size=8, channels=1)
    assert named.classes == ["e", "n", "s", "w"]
    first = next(named.train.batches(4).epoch(0))
    assert [named.classes[label] for label in first["labels"]] == ["nesw"[number % 4] for number in numbers(named, first)]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"split": "trian"}, UsageError, "has no split 'trian'; did you mean 'train'"),
        ({"test_split": "val"}, UsageError, "has no split 'val'; it has train, test"),
        ({"image": "img"}, UsageError, "has no column 'img'.* name the image: image=...; it has image, label"),
        ({"path": "/nowhere/at/all"}, DatasetError, "the dataset '/nowhere/at/all' is not available: .* or give a folder"),
    ],
)
def test_mistakes_with_tables_are_answered(options, error, text, table, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=text):
        datasets.build("hf_dataset", **{"path": str(table), "img_size": 8, **options})


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 images in three classes, as `imagefolder` reads it, and a private image beside it."""
    for number in range(12):
        path = tmp_path / "pets" / "nes"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    (tmp_path / "private.png").write_bytes(png(99))
    return tmp_path / "pets"


def test_paths_in_rows_are_followed_within_the_data_set(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "tables")
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)
    data = datasets.build("hf_dataset", path=str(pictures), img_size=8, channels=1, workers=2, val_size=0)
    assert data.classes == ["e", "n", "s"]
    seen = [*flat(epoch(data)), *data.test.images[:, 0, 0, 0].tolist()]
    assert sorted(seen) == list(range(12))


def test_paths_in_rows_that_lead_out_of_the_data_set_are_named_and_not_opened(pictures, tmp_path, monkeypatch):
    (pictures / "link.png").symlink_to(tmp_path / "private.png")
    away = [pictures / ".." / "private.png", tmp_path / "private.png", pictures / "link.png"]
    paths = [pictures / "n" / "0.png", *away, pictures / "no.png"]
    rows = {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [0, 1, 0, 1, 0]}
    rows["image"] += [{"bytes": png(50 + number), "path": "/etc/passwd"} for number in range(6)]
    rows["label"] += [0, 1] * 3
    cell = {"bytes": hf.Value("binary"), "path": hf.Value("string")}
    features = hf.Features({"image": cell, "label": hf.ClassLabel(names=["a", "b"])})
    hf.disable_progress_bars()
    hf.Dataset.from_dict(rows, features=features).save_to_disk(str(pictures))
    opened = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or original(path))
    data = datasets.build("hf_dataset", path=str(pictures), img_size=8, channels=1, workers=2, val_size=0, test_size=1)
    list(data.train.batches(4).epoch(0))
    problems = sorted({*data.skipped, *data.train.skipped})
    assert [line.split(": ", 1)[1].split(" '")[0] for line in problems] == [
        "row 1: its path", "row 2: its path", "row 3: its path", "row 4: there is no file at its path",
    ]  # fmt: skip
    assert all("leads out of the data set" in line for line in problems[:3])
    assert {path.name for path in opened} <= {"0.png"}


FLAGS = ("--eval-every", "2", "--device", "cpu", "--precision", "fp32", "--batch-size", "64", "--img-size", "16",
         "--patch-size", "4", "--emb-dim", "16", "--depth", "1", "--num-heads", "2", "--eval-size", "150")  # fmt: skip


@pytest.mark.slow
def test_a_recipe_trains_on_shards_and_goes_on_bit_for_bit(digits, train, tmp_path, monkeypatch):
    import vitkit_streams.images as images

    flags = ("--dataset", "webdataset", *digits, *FLAGS, "--epochs", "2")
    whole = train("jepa_mnist.py", tmp_path / "whole", *flags)
    assert whole["dataset"]["name"] == "webdataset"
    assert whole["status"] == "finished"
    assert "left out because they cannot be read: 1 (" in (tmp_path / "whole" / "log.txt").read_text()
    decoded, original = [], images.decode

    def stopping(*arguments):
        decoded.append(1)
        if len(decoded) == 600:  # 300 to begin with, and 192 each epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", stopping)
        train("jepa_mnist.py", tmp_path / "cut", *flags, code=130)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = train("jepa_mnist.py", tmp_path / "cut", "--resume")
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert resumed["final"] == whole["final"]


@pytest.mark.slow
def test_the_vae_trains_and_is_evaluated_on_shards(digits, train, tmp_path):
    summary = train("vae_mnist.py", tmp_path / "run", "--dataset", "webdataset", *digits, *FLAGS, "--epochs", "1")
    assert summary["dataset"]["train"] == 216  # less a tenth for validation
    assert summary["protocols"]["knn_top1"]["samples"] == 60
    assert summary["final"]["knn_top1"] > 0.2  # chance is 0.1


def _rank(number, folder, shards):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    data = build(Path(shards), cache=f"{folder}/cache")  # both make the index at the same time
    batches = data.train.batches(8, shuffle=True)
    found = [numbers(data, batch) for batch in batches.epoch(0, seed=3, rank=number, world=2)]
    assert len(found) == len(batches)
    torch.save((found, data.mean, data.test.labels), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_see_every_sample_once(shards, tmp_path):
    mp.spawn(_rank, (str(tmp_path), str(shards)), nprocs=2)
    (one, mean, held), (two, other_mean, other_held) = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    data = build(shards)
    assert (mean, held.tolist()) == (other_mean, other_held.tolist()) == (data.mean, data.test.labels.tolist())
    expected = epoch(data, size=16)
    assert [sorted(a + b) for a, b in zip(one, two, strict=True)] == expected
    everything = flat(one + two)
    assert len(everything) == len(set(everything)) == len(data.train)


def test_an_image_split_of_tensors_reads_as_before():
    images, labels = torch.arange(12, dtype=torch.uint8).view(6, 1, 1, 2), torch.arange(6)
    split = ImageSplit(images, labels, Preprocessing((1, 1, 2), (0.0,), (1.0,)))
    ((found, rows),) = split.read([torch.tensor([4, 1])])
    assert torch.equal(found, images[[4, 1]])
    assert rows.tolist() == [4, 1]
    assert split.skipped == []


@pytest.mark.slow
def test_the_readmes_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[1] / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["batch"]["images"].shape) == (64, 1, 16, 16)
