"""The fine-tuning recipe on digits, from scratch and from a saved run: a classifier that other commands take."""

import json
from pathlib import Path

import pytest
import torch

import vitkit
from vitkit.cli.run import run
from vitkit.data import build
from vitkit.errors import UsageError

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.py"
SMALL = ["--dataset", "digits", "--device", "cpu", "--precision", "fp32", "--batch-size", "64"]
TINY = ["--backbone-arg", "embed_dim=32", "--backbone-arg", "depth=2", "--backbone-arg", "num_heads=2"]


def train(out, *flags):
    with pytest.raises(SystemExit) as leaving:
        run(RECIPE, [*SMALL, *flags, "--out", str(out)])
    assert leaving.value.code == 0
    return out


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A run from scratch."""
    return train(tmp_path_factory.mktemp("scratch") / "run", *TINY, "--epochs", "6", "--eval-every", "2", "--lr", "0.01")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, scratch):
    """A run that begins with the network of `scratch`, and trains its last block on 60 labels."""
    flags = ["--model", str(scratch), "--train-size", "60", "--epochs", "4", "--patience", "1", "--mix", "both"]
    return train(tmp_path_factory.mktemp("tuned") / "run", *flags, "--tune", "partial", "--blocks", "1", "--batch-size", "20")


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


def test_it_learns_and_gives_the_interval_of_what_it_reached(scratch):
    facts = summary(scratch)
    final, protocols = facts["final"], facts["protocols"]
    assert final["accuracy_low"] < final["accuracy_top1"] < final["accuracy_high"]
    assert final["accuracy_top1"] > 0.5
    best = facts["best"]["val_accuracy_top1"]
    assert protocols["accuracy_top1"]["split"] == "test"
    assert protocols["accuracy_top1"]["note"].endswith(f"weights of epoch {best['epoch']}, the best on validation images")
    assert protocols["val_accuracy_top1"]["samples"] == 128
    log = (scratch / "log.txt").read_text()
    assert "start: random weights of vitkit:vit; 1,287 labelled training images of 10 classes" in log
    for text in ("test images are right", "believe an accuracy between", "The weakest class is"):
        assert text in log


def test_the_saved_weights_are_those_that_were_measured(scratch):
    model, data = vitkit.load(scratch), build("digits")
    answers = model.predict(data.test.images, top=1)
    hits = sum(int(one.label) == label for one, label in zip(answers, data.test.labels.tolist(), strict=True))
    assert hits / len(answers) == pytest.approx(summary(scratch)["final"]["accuracy_top1"], abs=1e-6)


def test_the_report_shows_classes_confusion_and_the_surest_mistakes_with_attention(scratch):
    report = (scratch / "report.html").read_text()
    for text in ("accuracy confusion", "class accuracy", "surest mistakes", "attention over mistakes", "95 % interval"):
        assert text in report
    for name in ("class_accuracy", "surest_mistakes", "attention_over_mistakes", "accuracy_confusion"):
        assert (scratch / "plots" / f"{name}.png").stat().st_size > 1000


def test_from_a_saved_run_only_the_chosen_part_has_changed(scratch, tuned):
    first, second = vitkit.load(scratch).backbone.state_dict(), vitkit.load(tuned).backbone.state_dict()
    changed = {name.split(".")[0] + "." + name.split(".")[1] for name in first if not torch.equal(first[name], second[name])}
    assert "blocks.1" in changed
    assert changed <= {"blocks.1", "norm.weight", "norm.bias"}
    assert f"start: the saved model {scratch}; 60 labelled training images" in (tuned / "log.txt").read_text()


def test_other_commands_take_the_result(tuned, tmp_path, shell):
    names = ("--evaluator", "accuracy", "--evaluator", "class_accuracy")
    done = shell("eval", str(tuned), "--dataset", "digits", *names, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert f"{summary(tuned)['final']['accuracy_top1']:.4f}" in done.stdout
    assert shell("attend", str(tuned), "digits", "--count", "2").returncode == 0
    assert shell("export", str(tuned), "--format", "torch-export", "-o", "digits.pt2").returncode == 0
    assert shell("push", str(tuned), "me/digits", "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nowhere", "no model at nowhere: it is neither a directory, nor a registered backbone"),
        ("--weights some.pth", "--weights some.pth needs a network to load them into; give it as --model"),
        ("--tune partial --blocks 9", "blocks is 9, but ViT has 6; give at most 6, or --tune full"),
        ("--label-fraction 0", r"fraction is 0.0; expected a number in \(0, 1\]"),
        ("--layer-decay 2", r"layer_decay is 2.0; expected a number in \(0, 1\]"),
        ("--eval-every 0", "eval_every is 0; expected at least 1"),
        ("--lr -1", "lr is -1.0; expected a finite positive number"),
        ("--epochs 0", "epochs is 0; expected at least 1"),
        ("--patience 0", "patience is 0; expected at least 1"),
        ("--label-smoothing 1", r"smoothing is 1.0; expected a number in \[0, 1\)"),
    ],
)
def test_mistakes_are_answered_before_the_first_step(flags, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        run(RECIPE, [*SMALL, *flags.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
