"""`vitkit data`: what the store holds, what it can get, and a person's own pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vitkit.cli.data import app
from vitkit.data.store import read_store, store_path
from vitkit.errors import DatasetError, UsageError, VitkitError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / "pets" / label / f"{index}.png")
    return tmp_path / "pets"


def run(*arguments: str) -> str:
    """What a command prints; vitkit's own errors are for its outer frame to print, and come through."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, VitkitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_importing_it_imports_no_torch():
    program = "import sys, vitkit.cli.data; print(sorted({'torch', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_empty_store_is_called_so(store):
    printed = run("list")
    assert f"dataset store {store}: empty" in printed
    (besides,) = (line for line in printed.splitlines() if line.startswith("also registered: "))
    named = besides.removeprefix("also registered: ").split(", ")
    assert named == sorted(named)
    assert {"cifar10", "cifar100", "digits", "fashion_mnist", "image_folder", "mnist"} <= set(named)


def test_import_then_list_then_import_again(folder, store):
    (folder / "cat" / "bad[1].png").write_bytes(b"no")
    printed = run("import", folder, "--name", "pets", "--img-size", "8", "--test-fraction", "0.4")
    assert "pets: 6 + 4 images in 2 classes at" in printed
    assert f"left out: {folder / 'cat' / 'bad[1].png'}: UnidentifiedImageError" in printed
    row = next(line for line in run("list").splitlines() if "pets" in line and "│" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["pets", "6", "4", "3×8×8", "2", "0.0"]
    with pytest.raises(UsageError, match=r"--name pets: .*pets\.safetensors exists already; .* or give --overwrite"):
        run("import", folder, "--name", "pets")
    run("import", folder, "--name", "pets", "--img-size", "4", "--overwrite")
    assert read_store(store_path("pets")).train.images.shape[1:] == (3, 4, 4)


@pytest.mark.parametrize("name", ["mnist", "digits", "auto"])
def test_a_name_that_means_something_else_is_refused(folder, name):
    with pytest.raises(UsageError, match=f"--name {name}: that name has another meaning for --dataset; choose another"):
        run("import", folder, "--name", name)


@pytest.mark.parametrize("folder", ["", "  "])
def test_an_empty_folder_argument_is_not_the_working_directory(folder, store):
    with pytest.raises(UsageError, match="FOLDER is empty, perhaps an unset variable"):
        run("import", folder, "--name", "pets")


def test_a_name_that_leads_out_of_the_store_is_refused(folder):
    with pytest.raises(UsageError, match="a dataset's name begins with a letter or digit"):
        run("import", folder, "--name", "../pets")


def test_a_broken_file_is_listed_with_the_way_out(store):
    store.mkdir()
    store_path("pets").write_bytes(b"[nonsense]")
    printed = run("list")
    assert f"broken: {store_path('pets')} is cut short or no store file" in printed
    assert "delete it and make it again" in printed


def test_get_says_what_there_is():
    assert run("get", "digits") == "digits: 1,287 + 128 + 382 images, 10 classes\n"


def test_get_of_what_is_broken_says_so(store):
    store.mkdir()
    store_path("mnist").write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match=r"mnist\.safetensors is cut short"):
        run("get", "mnist")
