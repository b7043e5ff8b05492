"""Features of many images into a file: rows and names, what is left out, and going on after a stop."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lazy_images import Lazy
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import vitkit
from vitkit import backbones, data, datasets
from vitkit.errors import DatasetError, RunError, UsageError
from vitkit.models import embed as embedding
from vitkit.models.embed import embed
from vitkit.models.image_sources import DatasetSplit, find_source
from vitkit.models.saving import save

PREPARE = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "resize"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(embedding, "PIECE_IMAGES", 4)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    backbone = backbones.build("vit", img_size=8, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    save(tmp_path / "model", {"backbone": backbone}, preprocessing=PREPARE, classes=["x", "y"], arguments={})
    return vitkit.load(tmp_path / "model")


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures in two folders."""
    random = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def read(path):
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["vitkit"])
    return load_file(path), about


def test_rows_names_and_labels_of_a_folder(model, pictures, tmp_path):
    done = embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors", model_name="mine", batch_size=2)
    tensors, about = read(tmp_path / "out.safetensors")
    assert (done.count, done.width, done.resumed, done.skipped) == (10, 8, 0, [])
    assert [str(Path(name).relative_to(pictures)) for name in about["files"]] == [
        *(f"a/{i}.png" for i in range(0, 10, 2)), *(f"b/{i}.png" for i in range(1, 10, 2)),
    ]  # fmt: skip
    assert about["classes"] == ["a", "b"]
    assert tensors["labels"].tolist() == [0] * 5 + [1] * 5
    assert about["preprocessing"] == PREPARE
    assert about["model"]["source"] == "mine"
    assert about["model"]["weights"] == model.config["weights"]["sha256"]
    torch.testing.assert_close(tensors["features"], model.embed(pictures))
    assert not (tmp_path / "out.safetensors.partial").exists()


def test_a_picture_that_cannot_be_read_is_named_and_left_out(model, pictures, tmp_path):
    (pictures / "a" / "2.png").write_bytes(b"no picture")
    whole = (pictures / "b" / "5.png").read_bytes()
    (pictures / "b" / "5.png").write_bytes(whole[: len(whole) // 2])
    done = embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors")
    tensors, about = read(tmp_path / "out.safetensors")
    assert len(tensors["features"]) == len(tensors["labels"]) == len(about["files"]) == 8
    assert about["skipped"] == done.skipped
    assert [line.partition(": ")[0] for line in done.skipped] == [str(pictures / "a" / "2.png"), str(pictures / "b" / "5.png")]
    assert "cannot identify image file" in done.skipped[0]
    with pytest.raises(UsageError, match=r"2\.png cannot be read as an image: UnidentifiedImageError"):
        model.embed(pictures)


def test_where_no_picture_can_be_read(model, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"none of the 1 images can be read: .*bad\.png: UnidentifiedImageError"):
        embed(model, find_source([str(tmp_path / "bad.png")]), tmp_path / "out.safetensors")


def test_a_datasets_split_in_its_order(model, tmp_path):
    digits = data.build("digits")
    source = find_source(["digits"])
    embed(model, source, tmp_path / "out.safetensors", batch_size=100)
    tensors, about = read(tmp_path / "out.safetensors")
    assert torch.equal(tensors["labels"], digits.test.labels)
    assert (about["dataset"], about["split"], len(about["classes"])) == ("digits", "test", 10)
    assert "files" not in about
    torch.testing.assert_close(tensors["features"], model.embed(digits.test.images, batch_size=100))
    assert len(find_source(["digits"], split="train")) == len(digits.train)


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_stopped_anywhere_it_goes_on_and_ends_with_the_same_file(model, pictures, tmp_path, calls):
    source = find_source([str(pictures)])
    whole = embed(model, source, tmp_path / "out.safetensors", batch_size=2)
    expected = whole.path.read_bytes()
    whole.path.unlink()

    seen = []

    def stop(done, total):
        seen.append(done)
        if len(seen) > calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, source, tmp_path / "out.safetensors", batch_size=2, progress=stop)
    assert not whole.path.exists()
    again = embed(model, source, tmp_path / "out.safetensors", batch_size=2)
    assert again.resumed == (calls - 1) // 2 * 4  # the piece under way is lost
    assert whole.path.read_bytes() == expected


def test_pieces_of_another_job_and_damaged_ones_are_computed_anew(model, pictures, tmp_path):
    out = tmp_path / "out.safetensors"
    expected = embed(model, find_source([str(pictures)]), out, batch_size=2).path.read_bytes()
    out.unlink()

    def stop(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, find_source([str(pictures)]), out, batch_size=2, progress=stop)
    piece = tmp_path / "out.safetensors.partial" / "000000000.safetensors"
    piece.write_bytes(piece.read_bytes()[:-5])
    assert embed(model, find_source([str(pictures)]), out, batch_size=2).resumed == 4
    assert out.read_bytes() == expected
    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        embed(model, find_source([str(pictures)]), out, batch_size=2, progress=stop)
    Image.new("L", (8, 8)).save(pictures / "a" / "0.png")
    changed = embed(model, find_source([str(pictures)]), out, batch_size=2)
    assert changed.resumed == 0
    assert out.read_bytes() != expected


def test_what_is_refused(model, pictures, tmp_path):
    source = find_source([str(pictures)])
    out = embed(model, source, tmp_path / "out.safetensors").path
    with pytest.raises(UsageError, match="exists already; choose another name, or give --overwrite"):
        embed(model, source, out)
    embed(model, source, out, overwrite=True)
    with pytest.raises(UsageError, match=r"expected the name of a .safetensors file"):
        embed(model, source, tmp_path / "out.npy")
    with pytest.raises(UsageError, match="--batch-size 0: expected at least 1"):
        embed(model, source, tmp_path / "b.safetensors", batch_size=0)
    with pytest.raises(RunError, match="choose another -o"):
        embed(model, source, "/proc/nowhere/b.safetensors")
    with pytest.raises(UsageError, match="'digts' is neither a file, a folder nor a dataset: .* did you mean 'digits'"):
        find_source(["digts"])
    with pytest.raises(UsageError, match="no image at .*nothing.png; give files and folders that exist"):
        find_source([str(pictures / "nothing.png")])
    with pytest.raises(UsageError, match="no images are given; give a folder"):
        find_source([])
    with pytest.raises(UsageError, match="--split is 'dev'; expected 'train', 'val', 'test'"):
        find_source(["digits"], split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no image: expected .png"):
        find_source([str(tmp_path / "empty")])


def test_two_processes_do_not_write_one_file(model, pictures, tmp_path):
    with embedding._partial_folder(tmp_path / "out.safetensors"):
        with pytest.raises(RunError, match="is being written by another process"):
            embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors")


@pytest.fixture
def stopped(model, pictures, tmp_path):
    """The output's path after an interruption at the end: all pieces are there, the output is not."""

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors", batch_size=2, progress=stop)
    return tmp_path / "out.safetensors"


def test_a_flipped_byte_anywhere_in_a_piece_is_noticed(model, pictures, stopped):
    piece = stopped.with_name("out.safetensors.partial") / "000000000.safetensors"
    intact = piece.read_bytes()
    expected = embed(model, find_source([str(pictures)]), stopped, batch_size=2).path.read_bytes()
    for place in range(0, len(intact), 7):
        stopped.unlink()
        piece.parent.mkdir()
        (piece.parent / embedding.MARKER).write_text("")
        piece.write_bytes(intact[:place] + bytes([intact[place] ^ 0x10]) + intact[place + 1 :])
        result = embed(model, find_source([str(pictures)]), stopped, batch_size=2)
        assert result.path.read_bytes() == expected
        assert result.resumed == 0


def test_a_folder_of_that_name_that_is_not_ours_stays(model, pictures, tmp_path):
    folder = tmp_path / "out.safetensors.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years")
    with pytest.raises(UsageError, match=r"partial exists and was not made by vitkit embed, .*; move it, or choose another -o"):
        embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors")
    assert not folder.exists()


def test_a_link_of_that_name_is_not_followed(model, pictures, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.safetensors.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="was not made by vitkit embed"):
        embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_that_somebody_put_among_the_pieces_stays(model, pictures, stopped):
    note = stopped.with_name("out.safetensors.partial") / "note.txt"
    note.write_text("mine")
    assert embed(model, find_source([str(pictures)]), stopped, batch_size=2).resumed == 8
    assert [path.name for path in note.parent.iterdir()] == ["note.txt"]


def test_neither_the_model_nor_any_other_file_is_overwritten(model, pictures, tmp_path):
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(UsageError, match=r"exists and is not a .safetensors file of features, so it is not replaced"):
        embed(model, find_source([str(pictures)]), weights, overwrite=True)
    assert weights.read_bytes() == before
    (tmp_path / "link.safetensors").symlink_to(weights)
    with pytest.raises(UsageError, match="so it is not replaced"):
        embed(model, find_source([str(pictures)]), tmp_path / "link.safetensors", overwrite=True)
    (tmp_path / "text.safetensors").write_text("a letter")
    with pytest.raises(UsageError, match="so it is not replaced"):
        embed(model, find_source([str(pictures)]), tmp_path / "text.safetensors", overwrite=True)


def test_a_name_that_is_not_utf_8_reaches_the_metadata(model, pictures, tmp_path):
    name = "caf\udce9.png"
    (pictures / "a" / "0.png").rename(pictures / "a" / name)
    embed(model, find_source([str(pictures)]), tmp_path / "out.safetensors")
    assert any(file.endswith(name) for file in read(tmp_path / "out.safetensors")[1]["files"])


@pytest.mark.parametrize("words", [[""], ["  "], ["pictures", ""]])
def test_an_empty_argument_is_not_the_working_directory(words):
    with pytest.raises(UsageError, match="an argument for the images is empty, perhaps an unset variable"):
        find_source(words)


def test_folders_train_and_test_are_no_classes(pictures, tmp_path):
    (tmp_path / "divided").mkdir()
    pictures.rename(tmp_path / "divided" / "train")
    source = find_source([str(tmp_path / "divided")])
    assert source.classes == ["a", "b"]
    flat = find_source([str(tmp_path / "divided" / "train" / "a")])
    assert flat.labels is None
    mixed = find_source([str(path) for path in sorted((tmp_path / "divided").rglob("*.png"))])
    assert (len(mixed), mixed.labels) == (10, None)


def test_a_fingerprint_follows_the_images():
    digits = data.build("digits")
    test, train = DatasetSplit(digits, "test"), DatasetSplit(digits, "train")
    assert test.fingerprint() == DatasetSplit(digits, "test").fingerprint() != train.fingerprint()


def test_from_python_what_images_may_be(model, pictures):
    files = sorted(pictures.rglob("*.png"))
    expected = model.embed(pictures)
    torch.testing.assert_close(model.embed(files, batch_size=3), expected)
    torch.testing.assert_close(model.embed([Image.open(file) for file in files]), expected)
    torch.testing.assert_close(model.embed(files[0]), expected[:1])
    assert not model.embed(files).requires_grad
    for wrong in ([], 3, None):
        with pytest.raises(UsageError, match="expected a folder, image files, Pillow images or a uint8 tensor"):
            model.embed(wrong)
    with pytest.raises(UsageError, match="batch_size is 0; expected at least 1"):
        model.embed(files, batch_size=0)


def test_a_split_of_lazy_images_is_embedded_and_unreadable_ones_are_named(model, tmp_path):
    digits = datasets.build("digits")
    some = digits.test.subset(torch.arange(10))
    lazy = replace(digits, test=replace(some, images=Lazy(some.images, broken=[3])))
    done = embed(model, DatasetSplit(lazy, "test"), tmp_path / "lazy.safetensors", batch_size=4)
    assert (done.count, done.skipped) == (9, ["digits/test/3: it cannot be read"])
    embed(model, DatasetSplit(replace(digits, test=some), "test"), tmp_path / "plain.safetensors", batch_size=4)
    features, expected = (read(tmp_path / f"{name}.safetensors")[0]["features"] for name in ("lazy", "plain"))
    torch.testing.assert_close(features, expected[[0, 1, 2, 4, 5, 6, 7, 8, 9]])
