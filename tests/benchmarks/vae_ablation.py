"""The multi-task VAE on MNIST with each of its losses left out in turn.

    python tests/benchmarks/vae_ablation.py [--seeds 2] [--out DIR] [--train-size 10000] [--epochs 4]

Runs `recipes/vae_mnist.py` for each row and seed, or reads what an earlier call left in DIR, and prints means with the
smallest and largest value over the seeds, as lines of a Markdown table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "vae_mnist.py"
ROWS = {
    "all four": [],
    "without triplets": ["--triplet", "0"],
    "without classification": ["--classification", "0"],
    "without reconstruction": ["--reconstruction", "0"],
    "without KL": ["--kl", "0"],
    "all four, StepLR in place of the cosine": ["--schedule", "step"],
    "classification alone": ["--triplet", "0", "--reconstruction", "0", "--kl", "0"],
}
COLUMNS = {
    "accuracy": "accuracy_top1",
    "kNN": "knn_top1",
    "5-shot": "few_shot_5_top1",
    "transfer kNN": "transfer_knn_top1",
    "transfer linear": "transfer_linear_top1",
    "reconstruction MSE": "reconstruction_mse",
    "active units": "active_units",
}


def measured(row: str, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """The last evaluation of a run, trained now where it is not there yet."""
    directory = given.out / f"{row.replace(',', '').replace(' ', '-')}-{seed}"
    if not (directory / "report.html").exists():
        size, epochs = str(given.train_size), str(given.epochs)
        flags = ["--dataset", "mnist", "--train-size", size, "--eval-size", size, "--epochs", epochs, "--eval-every", epochs]
        flags += ["--transfer-to", "fashion_mnist", "--transfer-features", "embedding"]
        flags += ["--seed", str(seed), "--out", str(directory), "--overwrite"]
        subprocess.run([sys.executable, "-m", "vitkit", "run", str(RECIPE), *flags, *ROWS[row]], check=True)
    final: dict[str, float] = json.loads((directory / "summary.json").read_text())["final"]
    return final


def cell(values: list[float]) -> str:
    if not values:
        return "–"
    middle = sum(values) / len(values)
    digits = 1 if middle > 1 else 4
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/vae_ablation"))
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    found = {row: [measured(row, seed, given) for seed in range(given.seeds)] for row in ROWS}
    print("| " + " | ".join(["", *COLUMNS]) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for row, runs in found.items():
        cells = [cell([run[name] for run in runs if name in run]) for name in COLUMNS.values()]
        print("| " + " | ".join([row, *cells]) + " |")


if __name__ == "__main__":
    main()
