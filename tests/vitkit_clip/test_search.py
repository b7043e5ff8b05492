"""`vitkit search` on a saved model: what is nearest, by brute force too, and what it says where nothing can be searched."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

import vitkit
from vitkit import backbones, data, evaluators, heads
from vitkit.cli.main import app
from vitkit.data import write_store
from vitkit.errors import DatasetError, UsageError, VitkitError
from vitkit.models import saving
from vitkit_clip import Pairs, captions, vocabulary_of
from vitkit_clip.retrieval import half_of
from vitkit_clip.search import as_pair

CAPTION = "the photo on the left is 3 and the photo on the right is 5"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved()`: the directory of an untrained model of pairs of digits; `leave_out` names modules that it lacks."""

    def save(*, leave_out: tuple[str, ...] = (), shape: tuple[int, int, int] = (1, 8, 16), **config) -> Path:
        digits = data.build("digits")
        torch.manual_seed(0)
        modules = {
            "backbone": backbones.build(
                "pair_vit", img_size=8, in_chans=1, stem=[8, 16], num_heads=2, mlp_dim=16, depth=2
            ),
            "text": backbones.build(
                "text_transformer", vocabulary=vocabulary_of(captions(digits.classes)), embed_dim=16, depth=1
            ),
            "projector": heads.build("linear", in_dim=16, out_dim=8),
            "text_projector": heads.build("linear", in_dim=16, out_dim=8),
        }
        preprocessing = Pairs(digits.train, digits.classes, 8).preprocessing.to_json() | {"shape": list(shape)}
        saving.save(
            tmp_path / "run",
            {name: module for name, module in modules.items() if name not in leave_out},
            preprocessing=preprocessing,
            classes=digits.classes,
            arguments={},
            extra={"dataset": "digits"} | config,
        )
        return tmp_path / "run"

    return save


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures that can be read, grey, transparent and a pair, in two folders, one that cannot, and a text."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(generator.integers(0, 256, (30, 20, 4), dtype=np.uint8)).save(folder / "clear.png")
    Image.fromarray(generator.integers(0, 256, (16, 32, 3), dtype=np.uint8)).save(folder / "more" / "pair.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def run(*arguments: object) -> str:
    """What a command prints, in one line; vitkit's own errors are for its outer frame to print, and come through."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if isinstance(result.exception, VitkitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_a_caption_finds_the_pairs_that_are_nearest(saved, tmp_path):
    target, directory = tmp_path / "found.png", saved()
    said = run("search", directory, CAPTION, "--count", 3, "--among", 60, "-o", target)
    model, digits = vitkit.load(directory), data.build("digits")
    pairs = Pairs(digits.test, digits.classes, 60).fixed(0, 60)
    (batch,) = pairs.epoch(0)
    with torch.no_grad():
        seen = model.projector(model.backbone.encode_image(batch["images"]))
        text = model.text_projector(model.text.encode_text([CAPTION]))
    scores, best = F.cosine_similarity(seen, text).sort(descending=True)
    assert "nearest in 60 pairs of digits's test images, seed 0" in said
    for place, (score, number) in enumerate(zip(scores[:3].tolist(), best[:3].tolist(), strict=True), start=1):
        left, right = divmod(int(batch["labels"][number]), 10)
        assert f"│ {place} │ {score:.4f} │ {left} | {right} │" in said
    with Image.open(target) as image:
        assert image.size[0] > image.size[1]
    assert f"{target}: 3 images" in said


def test_a_picture_finds_captions_and_pictures(saved, pictures, tmp_path):
    directory = saved()
    said = run(
        "search", directory, pictures / "grey.png", "--folder", pictures, "--count", 5, "-o", tmp_path / "found.png"
    )
    model = vitkit.load(directory)
    half = half_of(model)
    with Image.open(pictures / "grey.png") as opened:
        pair = as_pair(opened, half)
    with torch.no_grad():
        seen = model.projector(model.backbone.encode_image(pair))
        texts = model.text_projector(model.text.encode_text(captions(model.classes)))
    scores = F.cosine_similarity(seen, texts)
    assert f"│ 1 │ {float(scores.max()):.4f} │ {captions(model.classes)[int(scores.argmax())]} │" in said
    assert "│ 1 │ 1.0000 │ grey.png │" in said  # itself
    assert "clear.png" in said
    assert str(Path("more") / "pair.png") in said
    assert f"left out: {pictures / 'broken.jpg'} cannot be read as an image: UnidentifiedImageError" in said
    assert "4 images" in said


def test_a_wide_picture_is_a_pair_and_any_other_stands_on_both_halves(saved, pictures):
    half = half_of(vitkit.load(saved()))
    with Image.open(pictures / "more" / "pair.png") as wide, Image.open(pictures / "clear.png") as high:
        pair, twice = as_pair(wide, half), as_pair(high, half)
    assert pair.shape == twice.shape == (1, 1, 8, 16)
    assert torch.equal(twice[..., :8], twice[..., 8:])
    assert not torch.equal(pair[..., :8], pair[..., 8:])


def test_another_dataset_is_adapted(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    images = torch.randint(0, 256, (24, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensors = {f"{split}.images": images for split in ("train", "test")}
    tensors |= {f"{split}.labels": torch.arange(24) % 2 for split in ("train", "test")}
    write_store("colours", tensors, ["warm", "cold"])
    said = run(
        "search", saved(), CAPTION, "--dataset", "colours", "--among", 30, "--count", 2, "-o", tmp_path / "found.png"
    )
    assert "nearest in 30 pairs of colours's test images" in said
    assert "warm" in said or "cold" in said


def test_a_saved_model_is_evaluated_as_it_was_trained(saved):
    model, digits = vitkit.load(saved()), data.build("digits")
    evaluate = evaluators.build("pair_retrieval", count=40, zero_shot=20)
    bare = torch.nn.Module()  # as in training, without what a saved model says of its images
    for name, module in model.named_children():
        bare.add_module(name, module)
    assert model.evaluate(evaluate, digits) == pytest.approx(evaluate(bare, digits))


def test_a_folder_that_has_the_name_of_a_registered_dataset_is_not_taken_for_it(saved, tmp_path):
    recorded = {"asked": "image_folder", "arguments": {"root": "my photos/digits"}, "digest": "0"}
    with pytest.raises(UsageError, match="name it: --dataset image_folder --dataset-arg 'root=my photos/digits'"):
        run("search", saved(data=recorded), CAPTION, "-o", tmp_path / "found.png")
    with pytest.raises(UsageError, match="--dataset-arg is an argument of --dataset; name the dataset, too"):
        run("search", saved(), CAPTION, "--dataset-arg", "root=x")


def test_unknown_words_are_named(saved, tmp_path):
    said = run("search", saved(), "a 3 beside a zebra", "--among", 9, "--count", 1, "-o", tmp_path / "found.png")
    assert "note: the model's vocabulary does not have 'a', 'beside', 'zebra': all unknown words are the same to it" in said


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ("", (), "the caption is empty; give some text, such as 'the photo on the left is ...', or an image's path"),
        ("zebra", (), "the caption 'zebra' has no word of this text encoder's vocabulary; its 17 words are 0, 1, 2"),
        ("3 " * 400, (), "has 400 words; this text encoder reads 32 at most: shorten it"),
        ("none.png", (), "there is no image none.png; give the path of one, or a caption"),
        ("3", ("--count", 0), "--count 0: expected 1 to 100"),
        ("3", ("--among", 0), "--among 0: expected at least 1"),
        ("3", ("--dataset", "digits", "--folder", "."), "--dataset and --folder exclude each other"),
        ("3", ("--folder", "nowhere"), "there is no folder nowhere; give one that holds images"),
        ("3", ("--out", "found.jpg"), "--out found.jpg: the file is a PNG; give a name that ends in .png"),
    ],
)
def test_what_cannot_be_searched_for_says_why(saved, tmp_path, monkeypatch, query, options, message):
    directory = saved()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        run("search", directory, query, *options)
    assert not (tmp_path / "search.png").exists()


def test_pictures_that_cannot_be_read_are_refused(saved, pictures, tmp_path):
    with pytest.raises(UsageError, match=r"broken.jpg cannot be read as an image: UnidentifiedImageError"):
        run("search", saved(), pictures / "broken.jpg")
    for path in pictures.rglob("*.png"):
        path.unlink()
    with pytest.raises(UsageError, match="holds no readable image; .*broken.jpg cannot be read as an image"):
        run("search", saved(), "3", "--folder", pictures, "-o", tmp_path / "found.png")
    (pictures / "broken.jpg").unlink()
    with pytest.raises(DatasetError, match="holds no image: expected .png, .jpg"):
        run("search", saved(), "3", "--folder", pictures)


def test_the_picture_that_is_searched_for_is_never_written_over(saved, tmp_path, monkeypatch):
    query = tmp_path / "query.png"
    Image.new("RGB", (12, 6), (9, 90, 200)).save(query)
    before = query.read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--out query\.png is the query image; give another name"):
        run("search", saved(), query, "--out", "query.png")
    assert query.read_bytes() == before


def test_models_that_cannot_search_are_named(saved):
    with pytest.raises(
        UsageError, match="needs a model with a 'backbone' and a 'text' that offers encode_text; Model has no text"
    ):
        run("search", saved(leave_out=("text", "text_projector")), CAPTION)
    with pytest.raises(UsageError, match="8×15 pixels, which are no pairs: their width is odd"):
        run("search", saved(shape=(1, 8, 15)), CAPTION)
    with pytest.raises(
        UsageError, match="does not name the dataset that it was trained on; name one with --dataset"
    ):
        run("search", saved(dataset=None), CAPTION)
