"""The dataset store: round trips, memory mapping, and what is said of files that are none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitkit.data.store import read_store, store_directory, store_lock, store_path, stored_names, write_store
from vitkit.errors import DatasetError, UsageError

CLASSES = ["cat", "dog", "犬"]


def tensors(n: int = 12, m: int = 6, size: int = 4) -> dict[str, torch.Tensor]:
    made = {}
    for split, count in (("train", n), ("test", m)):
        made[f"{split}.images"] = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8)
        made[f"{split}.labels"] = torch.arange(count) % len(CLASSES)
    return made


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    return tmp_path / "store"


def test_what_is_written_is_read(store):
    made = tensors()
    path = write_store("pets", made, CLASSES, skipped=["a.png: broken"], listing="abc")
    assert path == store / "pets.safetensors"
    found = read_store(path)
    assert (found.name, found.classes, found.skipped) == ("pets", CLASSES, ["a.png: broken"])
    assert found.metadata["listing"] == "abc"
    assert all(torch.equal(found.tensors[key], value) for key, value in made.items())
    assert torch.equal(found.train.images, made["train.images"])
    assert len(found.test) == 6
    assert stored_names() == ["pets"]


def test_writing_replaces_and_leaves_nothing_else_behind(store):
    write_store("pets", tensors(), CLASSES)
    before = read_store(store_path("pets"))
    images = before.train.images.clone()
    write_store("pets", tensors(), ["x", "y", "z"])
    assert read_store(store_path("pets")).classes == ["x", "y", "z"]
    assert torch.equal(before.train.images, images)  # who has it open keeps what they opened
    assert [path.name for path in store.iterdir()] == ["pets.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to look at memory mappings")
def test_images_stay_in_the_file_until_they_are_looked_at():
    path = write_store("pets", tensors(n=2000, size=32), CLASSES)
    images = read_store(path).train.images
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in piece.split("-")) for piece in mapped]
    assert any(low <= images.data_ptr() and images.data_ptr() + images.nbytes <= high for low, high in ranges)


def test_the_store_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", "~/elsewhere")
    assert store_directory() == Path.home() / "elsewhere"
    monkeypatch.delenv("VITKIT_DATA")
    assert store_directory().parts[-2:] == ("vitkit", "data")
    monkeypatch.setenv("VITKIT_DATA", "/nowhere/at/all")
    assert stored_names() == []


@pytest.mark.parametrize("name", ["../pets", "a/b", "a\\b", "..", ".hidden", "a..b", "", "a b", "-rf", "/etc/passwd"])
def test_a_name_cannot_lead_out_of_the_store(name):
    with pytest.raises(UsageError, match="a dataset's name begins with a letter or digit"):
        store_path(name)


def test_a_missing_file_is_named_with_the_way_to_see_what_there_is(store):
    with pytest.raises(DatasetError, match=r"there is no dataset file at .*pets\.safetensors; `vitkit data list` lists"):
        read_store(store_path("pets"))


def test_a_file_cut_short(store):
    path = write_store("pets", tensors(), CLASSES)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=r"pets\.safetensors is cut short .*delete it .*`vitkit data get pets`"):
        read_store(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG" * 100, b"\xff" * 64], ids=["empty", "text", "png", "ones"]
)
def test_a_foreign_file(store, content):
    store.mkdir()
    store_path("pets").write_bytes(content)
    with pytest.raises(DatasetError, match=r"cut short or no store file .*; delete it"):
        read_store(store_path("pets"))


def test_a_directory_of_that_name(store):
    store_path("pets").mkdir(parents=True)
    with pytest.raises(DatasetError, match="there is no dataset file at"):
        read_store(store_path("pets"))


def broken(change: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in (tensors() | change).items() if value is not None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test.labels": None}, "it lacks test.labels"),
        ({"train.images": torch.zeros(12, 1, 4, 4)}, "train.images is torch.float32 (12, 1, 4, 4), expected uint8"),
        ({"train.images": torch.zeros(12, 16, dtype=torch.uint8)}, "train.images is torch.uint8 (12, 16), expected"),
        ({"test.images": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)}, "test.images is (6, 3, 4, 4), expected (n, 1, 4, 4)"),
        ({"train.labels": torch.zeros(11, dtype=torch.int64)}, "train.labels is torch.int64 (11,), expected int64 (12,)"),
        ({"test.labels": torch.zeros(6, dtype=torch.int32)}, "test.labels is torch.int32 (6,), expected int64 (6,)"),
        ({"test.labels": torch.full((6,), 3)}, "test.labels run from 3 to 3, expected 0 to 2 for its 3 classes"),
        ({"train.labels": torch.full((12,), -2)}, "train.labels run from -2 to -2, expected 0 to 2 for its 3 classes, or -1"),
        (
            {"train.images": torch.zeros(0, 1, 4, 4, dtype=torch.uint8), "train.labels": torch.zeros(0, dtype=torch.int64)},
            "it holds no training images",
        ),
    ],
)  # fmt: skip
def test_wrong_content_is_told_when_read_and_when_written(store, change, said):
    store.mkdir()
    save_file(broken(change), store_path("pets"), metadata={"classes": json.dumps(CLASSES)})
    with pytest.raises(DatasetError) as reading:
        read_store(store_path("pets"))
    assert said in str(reading.value)
    assert "delete it and make it again" in str(reading.value)
    with pytest.raises(DatasetError) as writing:
        write_store("other", broken(change), CLASSES)
    assert said in str(writing.value)
    assert stored_names() == ["pets"]


@pytest.mark.parametrize("classes", [None, "null", "[]", "[1, 2, 3]", "{}", '"cat"'])
def test_classes_that_are_no_list_of_names(store, classes):
    store.mkdir()
    save_file(tensors(), store_path("pets"), metadata={} if classes is None else {"classes": classes})
    with pytest.raises(DatasetError, match="it names no classes: its metadata 'classes' should be a JSON list"):
        read_store(store_path("pets"))


def test_metadata_that_is_no_json(store):
    store.mkdir()
    save_file(tensors(), store_path("pets"), metadata={"classes": "[cat"})
    with pytest.raises(DatasetError, match="cut short or no store file"):
        read_store(store_path("pets"))


def test_a_store_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"cannot write .*file/pets\.safetensors: .*VITKIT_DATA to another"):
        write_store("pets", tensors(), CLASSES)
    with pytest.raises(DatasetError, match="VITKIT_DATA"), store_lock("pets"):
        pass


@pytest.fixture
def full_disk():
    """A limit on file sizes stands in for a full disk: the system refuses in the middle of writing."""
    resource = pytest.importorskip("resource", reason="needs POSIX file size limits")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_written(store, full_disk):
    with pytest.raises(
        DatasetError, match=r"cannot write .*pets\.safetensors: .*[Ff]ile too large.*free some room there"
    ):
        write_store("pets", tensors(n=1000, size=32), CLASSES)
    assert list(store.iterdir()) == []


def test_a_validation_split_and_images_without_labels_are_kept():
    made = tensors() | {"val.images": torch.ones(3, 1, 4, 4, dtype=torch.uint8), "val.labels": torch.tensor([2, -1, 0])}
    found = read_store(write_store("pets", made, CLASSES))
    assert torch.equal(found.val.images, made["val.images"])
    assert found.val.labels.tolist() == [2, -1, 0]
    assert read_store(write_store("pets", tensors(), CLASSES)).val is None
    blind = tensors() | {name: torch.full((count,), -1) for name, count in (("train.labels", 12), ("test.labels", 6))}
    assert read_store(write_store("photos", blind, [])).classes == []
    with pytest.raises(DatasetError, match="it lacks val.labels"):
        write_store("pets", {name: value for name, value in made.items() if name != "val.labels"}, CLASSES)


def test_files_are_those_of_safetensors(tmp_path):
    """What is written in pieces is read by the library, aligned, and what the library writes is read here."""
    made = tensors(n=7, m=5, size=3)  # 63 bytes of pixels: labels after them would not be aligned
    path = write_store("pets", made, CLASSES)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], value) for name, value in made.items())
    save_file(made, path, metadata={"classes": json.dumps(CLASSES)})
    assert torch.equal(read_store(path).train.images, made["train.images"])


def test_long_lists_of_left_out_images_are_cut():
    found = read_store(write_store("pets", tensors(), CLASSES, skipped=[f"{number}.png: broken" for number in range(1500)]))
    assert (len(found.skipped), found.skipped[-1]) == (1001, "and 500 more")
