"""A folder of pictures as a dataset: imported once, and again when it changes."""

from pathlib import Path

import pytest
from PIL import Image

from vitkit import datasets
from vitkit.contracts import Dataset
from vitkit.data import image_folder, store_path, stored_names
from vitkit.errors import ArgumentsError, DatasetError


@pytest.fixture
def imports(tmp_path, monkeypatch) -> list[str]:
    """Every import that was made, in a store of its own."""
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    made: list[str] = []

    def counted(root, name, **options):
        made.append(name)
        return image_folder.import_folder(root, name, **options)

    monkeypatch.setattr("vitkit_data.folder.import_folder", counted)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    for label in ("cat", "dog"):
        for index in range(5):
            add(tmp_path / "pets" / label / f"{index}.png", index)
    return tmp_path / "pets"


def add(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (shade, 0, 0)).save(path)


def test_it_is_a_dataset_that_is_imported_once(folder, imports):
    found = datasets.build("image_folder", root=str(folder), img_size=8)
    assert isinstance(found, Dataset)
    assert (found.name, found.classes, found.shape) == ("pets", ["cat", "dog"], (3, 8, 8))
    assert (len(found.train), len(found.val), len(found.test)) == (6, 2, 2)
    assert found.notice == ""
    assert str(folder) not in found.source  # a saved model tells nobody about a person's own disk
    datasets.build("image_folder", root=str(folder), img_size=8)
    datasets.build("image_folder", root=str(folder.parent / "." / "pets"), img_size=8)
    assert len(imports) == 1


def test_a_change_is_imported_over_the_old_copy(folder, imports):
    datasets.build("image_folder", root=str(folder), img_size=8)
    add(folder / "cat" / "new.png", 9)
    found = datasets.build("image_folder", root=str(folder), img_size=8)
    assert len(found.train) + len(found.val) + len(found.test) == 11
    (folder / "cat" / "new.png").unlink()
    assert len(datasets.build("image_folder", root=str(folder), img_size=8).train) == 6
    assert len(imports) == 3
    assert len(stored_names()) == 1
    assert datasets.build("image_folder", root=str(folder), img_size=4).shape == (3, 4, 4)
    assert len(stored_names()) == 2


def test_a_damaged_copy_is_made_anew(folder, imports):
    datasets.build("image_folder", root=str(folder), img_size=8)
    store_path(imports[0]).write_bytes(b"nonsense")
    assert len(datasets.build("image_folder", root=str(folder), img_size=8).train) == 6


def test_what_was_left_out_is_told_every_time(folder, imports):
    for index in range(7):
        (folder / "dog" / f"bad{index}.jpg").write_bytes(b"no")
    for _ in range(2):
        found = datasets.build("image_folder", root=str(folder), img_size=8)
        assert len(found.skipped) == 7
        assert found.notice.startswith("7 left out of the images: ")
        assert "bad" in found.notice
        assert found.notice.endswith("; and 2 more")
    assert len(imports) == 1


def test_a_folder_that_is_not_there_and_one_that_is_not_said(tmp_path, imports):
    with pytest.raises(DatasetError, match="there is no folder at .*nowhere; expected one"):
        datasets.build("image_folder", root=str(tmp_path / "nowhere"))
    with pytest.raises(ArgumentsError, match="dataset 'image_folder' needs the argument 'root'"):
        datasets.build("image_folder")
    assert imports == []
