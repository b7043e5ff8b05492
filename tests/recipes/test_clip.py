"""The CLIP recipe from the command line to the saved model, on digits as pairs."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import vitkit
from vitkit.cli.run import run
from vitkit.data import build
from vitkit.errors import UsageError, VitkitError
from vitkit.reproduce import reproduce
from vitkit_clip import CLIP, Pairs, captions

RECIPE = Path(__file__).parents[2] / "recipes" / "clip_cifar100.py"


def train(directory, *flags, dataset="digits"):
    """The summary of a run with these flags."""
    with pytest.raises(SystemExit) as leaving:
        run(RECIPE, ["--dataset", dataset, *flags, "--out", str(directory)])
    assert leaving.value.code == 0
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip") / "run"
    return directory, train(directory, "--epochs", "6", "--warmup", "1", "--eval-every", "6", "--ema", "0.95")


@pytest.mark.slow
def test_the_embedded_default_beats_chance_twentyfold(trained):
    directory, summary = trained
    assert summary["final"]["i2t_top1"] > 20 * summary["protocols"]["i2t_top1"]["chance"]
    assert "text encoder: text_transformer, trained" in (directory / "log.txt").read_text()
    with (directory / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["6"]
    assert {path.stem for path in (directory / "plots").glob("*.png")} >= {
        "losses",
        "metrics",
        "pair_confusion",
        "pair_attention",
    }
    assert (directory / "checkpoints" / "best.safetensors").stat().st_size > 1000
    assert summary["protocols"]["val_i2t_top1"]["split"] == "val"  # what the best checkpoint and early stopping go by
    assert {"i2t_top1", "val_i2t_top1", "val_t2i_map"} <= set(summary["final"])


@pytest.mark.slow
def test_it_learns_from_real_pairs(tmp_path, real_data):
    flags = ["--train-size", "2000", "--batch-size", "64", "--epochs", "2", "--eval-every", "2", "--warmup", "1"]
    summary = train(tmp_path / "run", *flags, "--ema", "0.9", dataset="cifar100")
    assert summary["dataset"]["test"] == 10_000
    chances = {name: summary["protocols"][name]["chance"] for name in ("i2t_top100", "left_top1")}
    assert chances == pytest.approx({"i2t_top100": 0.01, "left_top1": 0.01}, rel=0.01)
    assert all(summary["final"][name] > 3 * chance for name, chance in chances.items())


@pytest.mark.slow
def test_the_saved_model_finds_captions_by_cosine_as_reported(trained):
    directory, summary = trained
    model, data = vitkit.load(directory), build("digits")
    assert set(dict(model.named_children())) == {"backbone", "text", "projector", "text_projector", "half_classifier"}
    assert model.preprocessing["shape"] == [1, 16, 32]
    pairs, hits = Pairs(data.resized(16).test, data.classes, 500).fixed(), []
    with torch.inference_mode():
        texts = F.normalize(model.text_projector(model.text.encode_text(captions(data.classes))), dim=1)
        for batch in pairs.epoch(0):
            seen = F.normalize(model.projector(model.encode_image(batch["images"])), dim=1)
            hits.append((seen @ texts.T).argmax(1) == batch["labels"])
    assert torch.cat(hits).float().mean().item() == pytest.approx(summary["final"]["i2t_top1"], abs=0.01)


@pytest.mark.slow
def test_its_flags_make_what_they_say(tmp_path):
    small = ("--epochs", "1", "--warmup", "0", "--train-size", "64")
    flags = (
        "--preset", "baseline", "--chunk", "8", "--loss", "siglip", "--freeze-text", "--no-caption-positives",
        "--augment", "rand", "--augment-pair", "stacked",
    )  # fmt: skip
    summary = train(tmp_path / "one", *small, *flags)
    assert "text encoder: text_transformer, frozen" in (tmp_path / "one" / "log.txt").read_text()
    assert summary["arguments"]["loss"] == "siglip"
    model = vitkit.load(tmp_path / "one")
    assert model.backbone.spec.kwargs["preset"] == "baseline"
    assert model.loss.spec.name == "siglip"
    again = ("--temperature", "learned", "--mix", "cutmix", "--classify", "0.5", "--loss", "focal_nce")
    train(tmp_path / "two", *small, *again)
    loss = vitkit.load(tmp_path / "two").loss
    assert loss.spec.kwargs["contrastive"] == "focal_nce"
    assert loss.contrastive.learned


@pytest.mark.slow
def test_with_the_default_preset_it_goes_on_after_a_stop_and_is_reproduced(tmp_path, monkeypatch):
    """`auto` is the preset for digits: the requested value counts, not the resolved one."""
    flags = ("--epochs", "2", "--eval-every", "2", "--warmup", "1", "--train-size", "64")
    loss, calls = CLIP.compute_loss, []

    def stopping(self, embedded):
        calls.append(1)
        if len(calls) == 2:  # the one step of the second epoch
            raise KeyboardInterrupt
        return loss(self, embedded)

    with monkeypatch.context() as patch:
        patch.setattr(CLIP, "compute_loss", stopping)
        with pytest.raises(SystemExit) as leaving:
            run(RECIPE, ["--dataset", "digits", *flags, "--out", str(tmp_path / "cut")])
        assert leaving.value.code == 130
    stopped = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (stopped["requested"]["preset"], stopped["arguments"]["preset"]) == ("auto", "digits")
    resumed = train(tmp_path / "cut", "--resume", "--preset", "auto", "--precision", "auto")
    assert resumed["final"]["i2t_top1"] >= 0.0
    again = reproduce(str(tmp_path / "cut"), out=tmp_path / "again", confirm=lambda _: True, console=Console(stderr=True))
    assert again is not None
    assert again.agrees, again
    assert not again.differences
    assert vitkit.load(tmp_path / "again").backbone.spec == vitkit.load(tmp_path / "cut").backbone.spec


@pytest.mark.slow
def test_a_text_tower_that_cannot_be_had_is_replaced_only_when_none_was_named(tmp_path, monkeypatch):
    build = vitkit.backbones.build

    def refusing(name, **arguments):
        if name == "openclip_text":
            raise VitkitError("the weights could not be downloaded")
        return build(name, **arguments)

    monkeypatch.setattr(vitkit.backbones, "build", refusing)
    flags = ("--epochs", "1", "--warmup", "0", "--train-size", "64", "--text")
    train(tmp_path / "run", *flags, "auto")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "could not be downloaded; text_transformer, trained from scratch, replaces it" in log
    assert "text encoder: text_transformer, trained" in log
    with pytest.raises(VitkitError, match="could not be downloaded"):
        run(RECIPE, ["--dataset", "digits", *flags, "openclip_text", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "vit"), "--text vit: that backbone has no encode_text; take text_transformer"),
        (("--text", "no_such"), "no backbone named 'no_such'"),
        (("--chunk", "0"), "chunk is 0; expected at least 1"),
        (("--batch-size", "5000"), "an epoch has no batches"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        run(RECIPE, ["--dataset", "digits", *flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
