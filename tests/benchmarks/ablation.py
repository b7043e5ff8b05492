"""A system with each of its parts left out or exchanged in turn.

    python tests/benchmarks/ablation.py vae [--seeds 2] [--out DIR] [--train-size 10000] [--epochs 4]
    python tests/benchmarks/ablation.py clip [--seeds 1] [--out DIR] [--train-size 6000] [--epochs 3]

Runs the system's recipe for each row and seed, or reads what an earlier call left in DIR, and prints means with the smallest and
largest value over the seeds, as lines of a Markdown table.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True)
class Study:
    """What is run for each row: the recipe, flags common to all rows, each row's own, and the columns' metrics."""

    recipe: str
    common: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    columns: dict[str, str]
    seeds: int
    train_size: int
    epochs: int


STUDIES = {
    "vae": Study(
        recipe="vae_mnist.py",
        common=("--dataset", "mnist", "--transfer-to", "fashion_mnist", "--transfer-features", "embedding"),
        rows={
            "all four": (),
            "without triplets": ("--triplet", "0"),
            "without classification": ("--classification", "0"),
            "without reconstruction": ("--reconstruction", "0"),
            "without KL": ("--kl", "0"),
            "all four, StepLR in place of the cosine": ("--schedule", "step"),
            "classification alone": ("--triplet", "0", "--reconstruction", "0", "--kl", "0"),
        },
        columns={
            "accuracy": "accuracy_top1",
            "kNN": "knn_top1",
            "5-shot": "few_shot_5_top1",
            "transfer kNN": "transfer_knn_top1",
            "transfer linear": "transfer_linear_top1",
            "reconstruction MSE": "reconstruction_mse",
            "active units": "active_units",
        },
        seeds=2,
        train_size=10_000,
        epochs=4,
    ),
    "clip": Study(
        recipe="clip_cifar100.py",
        common=("--dataset", "cifar100", "--preset", "best", "--warmup", "0.5", "--ema", "0.98"),
        rows={
            "as it is": (),
            "augmented as one image, flip included": ("--augment-pair", "stacked"),
            "equal captions as negatives": ("--no-caption-positives",),
            "temperature learned": ("--temperature", "learned"),
            "text tower frozen, as it was drawn": ("--freeze-text",),
            "without the classes of halves": ("--classify", "0"),
            "AdamW alone": ("--optimizer", "adamw"),
            "not augmented": ("--augment", "none"),
        },
        columns={
            "top-1": "i2t_top1",
            "top-10": "i2t_top10",
            "top-100": "i2t_top100",
            "left half": "left_top1",
            "right half": "right_top1",
            "exchanged above": "swapped_above",
        },
        seeds=1,
        train_size=6_000,
        epochs=3,
    ),
}


def measured(study: Study, row: str, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """The last evaluation of a run, trained now where it is not there yet."""
    directory = given.out / f"{row.replace(',', '').replace(' ', '-')}-{seed}"
    if not (directory / "report.html").exists():
        flags = ["--train-size", str(given.train_size), "--epochs", str(given.epochs), "--eval-every", str(given.epochs)]
        if study.recipe.startswith("vae"):
            flags += ["--eval-size", str(given.train_size)]
        flags += ["--seed", str(seed), "--out", str(directory), "--overwrite", *study.common, *study.rows[row]]
        subprocess.run([sys.executable, "-m", "vitkit", "run", str(RECIPES / study.recipe), *flags], check=True)
    final: dict[str, float] = json.loads((directory / "summary.json").read_text())["final"]
    return final


def cell(values: list[float]) -> str:
    if not values:
        return "–"
    middle = sum(values) / len(values)
    digits = 1 if middle > 1 else 4
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{middle:.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=STUDIES)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--epochs", type=int)
    given = parser.parse_args()
    study = STUDIES[given.system]
    for name in ("seeds", "train_size", "epochs"):
        if getattr(given, name) is None:
            setattr(given, name, getattr(study, name))
    given.out = given.out or Path("runs") / f"{given.system}_ablation"
    found = {row: [measured(study, row, seed, given) for seed in range(given.seeds)] for row in study.rows}
    print("| " + " | ".join(["", *study.columns]) + " |\n|" + "---|" * (len(study.columns) + 1))
    for row, runs in found.items():
        cells = [cell([run[name] for run in runs if name in run]) for name in study.columns.values()]
        print("| " + " | ".join([row, *cells]) + " |")


if __name__ == "__main__":
    main()
