"""What the recipes refuse before they train, and how long their schedules last when batches are put together."""

from pathlib import Path

import pytest

from vitkit import Run
from vitkit.cli.run import run
from vitkit.cli.scaffold import new_recipe
from vitkit.errors import UsageError

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("jepa_mnist", "vae_mnist", "vae_cifar10", "clip_cifar100")


@pytest.fixture(params=[*NAMES, "scaffold"])
def recipe(request, tmp_path):
    if request.param == "scaffold":
        new_recipe("mine", tmp_path)
        return tmp_path / "mine.py"
    return RECIPES / f"{request.param}.py"


def refused(recipe, flags, message, out):
    with pytest.raises(UsageError, match=message):
        run(recipe, ["--dataset", "digits", *flags.split(), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eval-every 0", "eval_every is 0; expected at least 1"),
        ("--epochs 0", "epochs is 0; expected at least 1"),
        ("--lr -1", "lr is -1.0"),
        ("--lr nan", "lr is nan"),
        ("--batch-size 5000", "an epoch has no batches: the batch size is larger than the training set"),
    ],
)
def test_of_every_recipe(recipe, flags, message, tmp_path):
    refused(recipe, flags, message, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("jepa_mnist", "--train-size 10", "an epoch has no batches"),
        ("jepa_mnist", "--label-fraction 2", r"fraction is 2.0; expected a number in \(0, 1\]"),
        ("jepa_mnist", "--label-fraction nan", r"fraction is nan; expected a number in \(0, 1\]"),
        ("jepa_mnist", "--no-multimodal --objective seed", "--objective reference needs labels; leave it or --no-multimodal out"),
        ("jepa_mnist", "--no-multimodal --swap 0.5", "--swap 0.5 needs labels; leave it or --no-multimodal out"),
        ("clip_cifar100", "--loss siglip --temperature learned", "loss 'siglip' takes no argument 'learned'"),
        ("clip_cifar100", "--loss margin_triplet --temperature learned", "loss 'margin_triplet' takes no argument 'learned'"),
        ("clip_cifar100", "--warmup nan", "warmup is nan; expected at least 0"),
        ("clip_cifar100", "--warmup -1", "warmup is -1.0; expected at least 0"),
        ("clip_cifar100", "--weight-decay -1", "weight_decay is -1.0; expected at least 0"),
        ("clip_cifar100", "--optimizer adamw --lr -1", "lr is -1.0; expected at least 0"),
        ("clip_cifar100", "--patience 0 --dry-run", "patience is 0; expected at least 1"),
        ("clip_cifar100", "--ema 1 --dry-run", "ema is 1.0; expected a decay between 0 and 1"),
    ],
)
def test_of_one(name, flags, message, tmp_path):
    refused(RECIPES / f"{name}.py", flags, message, tmp_path / "run")


class Seen(Exception):
    """What a recipe gave to `run.fit`."""


@pytest.mark.parametrize(
    ("name", "schedule"), [*((name, "cosine") for name in NAMES), ("vae_mnist", "step"), ("vae_cifar10", "step")]
)
def test_schedules_last_as_long_as_the_training_when_batches_are_put_together(name, schedule, tmp_path, monkeypatch):
    """Two epochs of eight batches in groups of three, three and two: six steps."""

    def fit(self, model, batches, **given):
        assert len(batches) == 8
        raise Seen(model, given)

    monkeypatch.setattr(Run, "fit", fit)
    flags = {"clip_cifar100": ["--preset", "baseline", "--warmup", "1"], "jepa_mnist": []}.get(
        name, ["--schedule", schedule, "--kl-warmup", "0.5", "--weighting", "progressive"]
    )
    many = ["--epochs", "2", "--train-size", "64", "--batch-size", "8", "--grad-accum", "3", "--lr", "0.004"]
    with pytest.raises(Seen) as seen:
        run(RECIPES / f"{name}.py", ["--dataset", "digits", *many, *flags, "--out", str(tmp_path / "run")])
    model, given = seen.value.args
    rates = []
    for _ in range(7):
        rates.append(given["optimizer"].param_groups[0]["lr"] / 0.004)
        given["optimizer"].step()
        given["schedule"].step()
    if schedule == "step":
        assert rates == pytest.approx([1, 1, 0.3, 0.3, 0.09, 0.09, 0.027])
    else:
        assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
        assert rates[6] == pytest.approx(0.01 if name == "clip_cifar100" else 0)
    if name.startswith("vae"):
        assert (model.loss.warmup, model.loss.stage) == (3, 1)  # of its calls, which are steps
