"""`vitkit sample`, `interpolate` and `reconstruct` on saved models, and what they say where it cannot be done."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vitkit import backbones, data, heads
from vitkit.cli.main import app
from vitkit.data import write_store
from vitkit.errors import CheckpointError, RunError, UnknownNameError, UsageError, VitkitError
from vitkit.models import saving
from vitkit.report.sheet import GAP, LINE

SIDE = 128
"""Of one of digits' images on a sheet: 8 pixels, sixteenfold."""


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(conditional=True)`: the directory of an untrained model of digits."""

    def save(name: str = "run", *, conditional: bool = False, decoder: bool = True, arguments=None, **config) -> Path:
        digits = data.build("digits")
        torch.manual_seed(0)
        modules = {
            "backbone": backbones.build(
                "vae_encoder", img_size=8, in_chans=1, patch_size=4, embed_dim=16, depth=1, num_heads=2, latent_dim=5
            )
        }
        if decoder:
            modules["decoder"] = heads.build(
                "conv_decoder", in_dim=5, out_dim=1, img_size=8, num_classes=10 if conditional else None
            )
        extra = {"dataset": "digits"} | config
        preprocessing = digits.train.preprocessing.to_json()
        saving.save(
            tmp_path / name, modules, preprocessing=preprocessing, classes=digits.classes, arguments=arguments or {}, extra=extra
        )
        return tmp_path / name

    return save


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "grid.png"


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    images = torch.randint(0, 256, (24, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(24) % 2
    tensors = {f"{split}.{part}": value for split in ("train", "test") for part, value in (("images", images), ("labels", labels))}
    write_store("colours", tensors, ["warm", "cold"])
    write_store("five", tensors | {f"{s}.images": images[:, :1].repeat(1, 5, 1, 1) for s in ("train", "test")}, ["a", "b"])
    return "colours"


def run(*arguments: object) -> str:
    """What a command prints, in one line; vitkit's own errors are for its outer frame to print, and come through."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, VitkitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def across(columns: int) -> int:
    return columns * (SIDE + GAP) + GAP


def test_sample_writes_the_same_file_for_the_same_seed(saved, target, tmp_path):
    directory = saved()
    assert run("sample", directory, "-o", target, "--count", 20) == f"{target}: 20 samples, seed 0"
    assert size(target) == (across(8), 3 * (SIDE + GAP) + GAP)
    first = target.read_bytes()
    run("sample", directory, "-o", target, "--count", 20)
    assert target.read_bytes() == first
    run("sample", directory, "--out", tmp_path / "other.png", "--count", 20, "--seed", 1)
    assert (tmp_path / "other.png").read_bytes() != first
    assert np.asarray(Image.open(target)).std() > 1


def test_sample_from_the_latents_that_images_have(saved, target):
    directory = saved()
    run("sample", directory, "-o", target, "--count", 8)
    standard = target.read_bytes()
    said = run("sample", directory, "-o", target, "--count", 8, "--fitted")
    assert said == f"{target}: 8 samples, seed 0, latents from a Gaussian fitted to those of training images"
    assert target.read_bytes() != standard
    with pytest.raises(UsageError, match="does not name the dataset that it was trained on"):
        run("sample", saved(dataset=None), "-o", target, "--fitted")


def test_sample_of_a_conditional_decoder_shows_its_classes_or_one(saved, target):
    directory = saved(conditional=True)
    run("sample", directory, "-o", target, "--count", 20)
    assert size(target) == (across(10), 2 * (SIDE + LINE + GAP) + GAP)
    assert run("sample", directory, "-o", target, "--count", 8, "--class", "3") == f"{target}: 8 samples of 3, seed 0"
    assert size(target) == (across(8), SIDE + 2 * GAP)


def test_interpolate_between_images_and_between_classes(saved, target):
    directory = saved()
    assert run("interpolate", directory, 3, 8, "-o", target) == f"{target}: 8 steps from 3 (#3) to 8 (#8), digits"
    assert size(target) == (across(10), SIDE + LINE + 2 * GAP)
    said = run("interpolate", directory, 3, 8, "--classes", "--steps", 5, "-o", target)
    assert said == f"{target}: 5 steps from 3 to 8, digits"
    assert size(target) == (across(5), SIDE + LINE + 2 * GAP)
    run("interpolate", saved("conditional", conditional=True), 3, 8, "-o", target)
    assert size(target) == (across(10), 2 * (SIDE + 2 * LINE + GAP) + GAP)  # as either class


def test_reconstruct_shows_originals_above_reconstructions(saved, target):
    said = run("reconstruct", saved(), "-o", target, "--count", 8)
    assert said.startswith(f"{target}: 8 test images of digits, seed 0, mean squared error 0.")
    assert size(target) == (across(8), 2 * (SIDE + LINE + GAP) + GAP)
    pixels = np.asarray(Image.open(target))
    original = data.build("digits").test.stratified_subset(8).images[0, 0]
    shown = pixels[GAP : GAP + SIDE : 16, GAP : GAP + SIDE : 16, 0]
    np.testing.assert_array_equal(shown, original)
    first = target.read_bytes()
    run("reconstruct", saved(), "-o", target, "--count", 8)
    assert target.read_bytes() == first
    run("reconstruct", saved(), "-o", target, "--count", 8, "--seed", 5)
    assert target.read_bytes() != first


def test_another_dataset_is_adapted_and_a_line_says_so(saved, target, colours):
    for directory in (saved(), saved("conditional", conditional=True)):
        said = run("reconstruct", directory, "--dataset", colours, "-o", target)
        assert said.startswith(
            "images of colours are 3×12×12 (channels, height, width), adapted to the model's 1×8×8 "
            f"{target}: 16 test images of colours, seed 0, mean squared error 0."
        )
        said = run("interpolate", directory, "warm", "cold", "--dataset", colours, "-o", target)
        assert said.endswith(f"{target}: 8 steps from warm to cold, colours")
        assert size(target)[0] == across(8)
    with pytest.raises(UsageError, match="five does not fit the model in .*: images have 5 channels, the model takes 1"):
        run("reconstruct", saved(), "--dataset", "five", "-o", target)
    with pytest.raises(UnknownNameError, match="no dataset named 'colour'; .*; did you mean 'colours'"):
        run("reconstruct", saved(), "--dataset", "colour", "-o", target)


def test_a_run_without_a_decoder(saved, target):
    directory = saved(decoder=False)
    for command in (["sample", directory], ["interpolate", directory, 1, 2], ["reconstruct", directory]):
        with pytest.raises(UsageError, match=r"this model has no decoder, which makes images \(it has backbone\); use"):
            run(*command, "-o", target)
    assert not target.exists()


def test_a_class_for_a_decoder_without_classes_or_that_is_none(saved, target):
    with pytest.raises(UsageError, match=r"--class 3: the decoder in .*run was trained without classes; leave --class out"):
        run("sample", saved(), "--class", 3, "-o", target)
    directory = saved("conditional", conditional=True)
    with pytest.raises(UsageError, match="there is no class 'cat'; classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"):
        run("sample", directory, "--class", "cat", "-o", target)


def test_ends_that_are_not_there(saved, target, colours):
    directory = saved()
    last = len(data.build("digits").test) - 1
    with pytest.raises(UsageError, match=rf"there is no test image 9999; they count from 0 to {last}"):
        run("interpolate", directory, 0, 9999, "-o", target)
    with pytest.raises(UsageError, match=r"there is no class '11'; did you mean '1'\? classes: 0, 1"):
        run("interpolate", directory, 0, 11, "--classes", "-o", target)
    with pytest.raises(UsageError, match="there is no class 'wram'; did you mean 'warm'. classes: warm, cold"):
        run("interpolate", directory, "cold", "wram", "--dataset", colours, "-o", target)
    for steps in (1, 5000):
        with pytest.raises(UsageError, match=f"--steps {steps}: expected 2 to 1,024 images, both ends included"):
            run("interpolate", directory, 0, 1, "--steps", steps, "-o", target)


def test_directories_that_cannot_be_read(saved, target, tmp_path):
    with pytest.raises(CheckpointError, match="no model at .*nowhere: no such directory; give a directory that a run"):
        run("sample", tmp_path / "nowhere", "-o", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no config\.json: no model was saved there"):
        run("reconstruct", tmp_path / "empty", "-o", target)
    directory = saved()
    (directory / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cut short or foreign; copy or download the whole directory again"):
        run("interpolate", directory, 0, 1, "-o", target)


def test_output_that_cannot_be_written_is_refused_and_leaves_nothing_behind(saved, tmp_path):
    for command in (["sample"], ["reconstruct"]):  # before the run is even looked at
        with pytest.raises(UsageError, match=r"--out grid.jpg: the file is a PNG; give a name that ends in .png"):
            run(*command, tmp_path / "nowhere", "-o", "grid.jpg")
    directory = saved()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/grid\.png: "):
        run("sample", directory, "-o", tmp_path / "file" / "grid.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match=r"--out .*folder\.png is a directory; expected the name of an image that vitkit drew"):
        run("sample", directory, "-o", tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png", "run"]


def test_a_photo_is_never_replaced_and_an_earlier_sheet_is(saved, tmp_path):
    directory, photo = saved(), tmp_path / "samples.png"
    Image.new("RGB", (12, 6), (9, 90, 200)).save(photo)
    before = photo.read_bytes()
    for command in (["sample", directory], ["reconstruct", directory], ["interpolate", directory, 0, 1]):
        with pytest.raises(UsageError, match=r"--out .*samples\.png exists and is not an image that vitkit drew, so it is not replaced"):
            run(*command, "-o", photo)
    assert photo.read_bytes() == before
    photo.unlink()
    run("sample", directory, "-o", photo, "--count", 2)
    first = photo.read_bytes()
    run("sample", directory, "-o", photo, "--count", 3)
    assert photo.read_bytes() != first


@pytest.mark.parametrize("count", [0, 1025])
def test_counts_out_of_range(saved, target, count):
    for command in ("sample", "reconstruct"):
        with pytest.raises(UsageError, match=f"--count {count}: expected 1 to 1,024 images"):
            run(command, saved(), "--count", count, "-o", target)


def test_a_model_that_names_no_dataset(saved, target):
    directory = saved(dataset=None)
    run("sample", directory, "-o", target)
    with pytest.raises(UsageError, match="run does not name the dataset that it was trained on; name one with --dataset"):
        run("reconstruct", directory, "-o", target)
    run("reconstruct", directory, "--dataset", "digits", "-o", target)


def record(asked: str, digest: str | None = None, **arguments: object) -> dict[str, object]:
    """What a run records of its dataset."""
    return {"asked": asked, "arguments": arguments, "digest": digest or data.build("digits").digest}


def test_the_dataset_of_the_training_is_known_by_its_digest_and_not_by_its_name(saved, target):
    expected = run("reconstruct", saved(), "-o", target)
    assert run("reconstruct", saved(data=record("auto")), "-o", target) == expected
    assert run("reconstruct", saved(data=record("digits", img_size=8)), "-o", target) == expected
    with pytest.raises(UsageError, match="the dataset digits is not the one that the model in .*: classes or labels differ"):
        run("reconstruct", saved(data=record("digits", "f" * 64)), "-o", target)
    directory = saved(data=record("image_folder", root="my photos/digits"))  # a folder that is called digits
    with pytest.raises(UsageError, match="name it: --dataset image_folder --dataset-arg 'root=my photos/digits'"):
        run("interpolate", directory, 0, 1, "-o", target)
    assert run("interpolate", directory, 0, 1, "--dataset", "digits", "--dataset-arg", "img_size=8", "-o", target)
    with pytest.raises(UsageError, match="--dataset-arg is an argument of --dataset; name the dataset, too"):
        run("reconstruct", saved(), "--dataset-arg", "img_size=8", "-o", target)


def test_a_model_of_an_earlier_version_is_known_by_its_classes_and_flags(saved, target, colours):
    with pytest.raises(UsageError, match="the dataset colours is not the one that the model in .*: classes or labels differ"):
        run("reconstruct", saved(dataset=colours), "-o", target)
    path = saved(arguments={"dataset": "image_folder", "dataset_arg": ["root=digits"]}) / "config.json"
    assert json.loads(path.read_text())["arguments"]["dataset_arg"] == ["root=digits"]
    with pytest.raises(UsageError, match="name it: --dataset image_folder --dataset-arg root=digits"):
        run("reconstruct", path.parent, "-o", target)


def test_they_are_listed_without_being_imported():
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom vitkit.cli.main import app\n"
        "said = CliRunner().invoke(app, ['--help']).output\n"
        "print([name in said for name in ('sample', 'interpolate', 'reconstruct')], 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found == "[True, True, True] False\n"
