"""Methods that learn without labels, compared after the same processor time, as one Markdown table.

    python -m tests.benchmarks ssl [--seconds 3600] [--dataset cifar10] [--seeds 3] [--out runs/ssl] [--methods mae dino]
                                   [--finetune 0.01 0.1 1] [-- --embed-dim 128 --depth 4]
    python -m tests.benchmarks ssl --cost [--shares 0 0.5 0.75]      # what masking saves

Each method trains with `recipes/ssl_cifar10.py` for `--seconds` of processor time: its step is timed first, and as many epochs are run as
fit, at least one. The words after `--` are flags of that recipe, the same for every method. Rows beside the methods: the same network
trained with labels for the same time, the untrained network, and raw pixels. Columns: kNN and linear probe on the test split after the last
epoch, RankMe on the validation split, and the processor time of training and evaluation. With `--finetune` each network is also fine-tuned
by `recipes/finetune.py` with these shares of the labels; the untrained network is then trained for as long as pretraining and fine-tuning
take together. Nothing is selected on the test split.

`--cost` prints another table: the processor time of a masked autoencoder's encoder, and of its step without the optimiser, for each share
of masked patches, forward and backward in bf16, 64 images of 32 pixels, as shares of the first row.

Finished runs in `--out` are not repeated, so the command can be called again after an interruption. With several seeds a cell is the mean,
with the smallest and the largest value.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vitkit import Run, backbones, evaluators
from vitkit.models import save
from vitkit.runs import processor
from vitkit.training import Recipe, parse_arguments
from vitkit_ssl import METHODS, build_method, raw_pixel_scores

from .recipes import RECIPES, measure

RECIPE = RECIPES / "ssl_cifar10.py"
FINETUNE = RECIPES / "finetune.py"
COLUMNS = {"kNN": "knn_top1", "linear": "linear_top1", "RankMe": "val_rankme"}
SCRATCH_EPOCHS = 200
"""Most epochs of fine-tuning from scratch: with 1 % of the labels an equal time would be thousands of epochs."""


class Captured(Exception):
    """Leaves a recipe before its training."""


def untrained(flags: Mapping[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Scores of the untrained network and of raw pixels ("pixels_..."); the network is saved in `folder` / "model"."""
    caught: dict[str, Any] = {}

    def before_training(run: Any, model: Any, data: Any, *_: Any, **__: Any) -> None:
        caught.update(model=model, data=data)
        raise Captured

    recipe = Recipe(RECIPE)
    requested = {n: None if n in recipe.preset_flags else flag.default for n, flag in recipe.flags.items()}
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(Run, "measure_untrained", before_training):
        run = Run(Path(scratch) / "run", device="cpu", seed=seed)
        try:
            recipe.run(run, requested | dict(flags) | {"method": "simclr"})
        except Captured:
            pass
        finally:
            run.discard()
    model, data = caught["model"], caught["data"]
    probes = [evaluators.build(f"vitkit:{name}", train_size=flags.get("train_size")) for name in ("knn", "linear_probe")]
    scores = {name: value for probe in probes for name, value in probe(model, data).items()}
    scores |= evaluators.build("vitkit:rankme")(model, data, split="val")
    scores |= {f"pixels_{name}": value for name, value in raw_pixel_scores(data, *probes).items()}
    (folder / "model").mkdir(parents=True, exist_ok=True)
    preprocessing = data.train.preprocessing.to_json()
    save(folder / "model", {"backbone": model.backbone}, preprocessing=preprocessing, classes=data.classes, arguments={})
    return scores


def processor_seconds(command: list[str]) -> float:
    """Run a command to its end, and return the processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def recipe_run(recipe: Path, folder: Path, words: list[str]) -> dict[str, float]:
    """The last metrics of a run and its "processor_seconds"; a run that has finished before is read."""
    record = folder / "processor.json"
    if not record.exists():
        command = [sys.executable, "-m", "vitkit", "run", str(recipe), "--out", str(folder), "--device", "cpu", "--overwrite", *words]
        record.write_text(json.dumps(processor_seconds(command)))
    final = json.loads((folder / "summary.json").read_text())["final"]
    return {**final, "processor_seconds": json.loads(record.read_text())}


def epochs_for(method: str, flags: Mapping[str, Any], seconds: float) -> int:
    """The number of epochs whose steps take `seconds` of processor time, at least one."""
    timed = measure(RECIPE, {**flags, "method": method}, rounds=3, evaluate=False)
    return max(1, round(seconds / (timed["step"] * timed["steps"] / timed["epochs"])))


def finetuned(model: Path, folder: Path, shares: list[float], dataset: list[str], budget: float) -> dict[str, float]:
    """Accuracy on the test split with each share of the labels; `budget` > 0 are seconds that training from scratch has besides."""
    scores = {}
    for share in shares:
        words = [*dataset, "--model", str(model), "--label-fraction", str(share)]
        result = recipe_run(FINETUNE, folder / f"finetune-{share:g}", words)
        if budget:
            epochs = len((folder / f"finetune-{share:g}" / "losses.csv").read_text().splitlines()) - 1
            longer = min(round(epochs * (1 + budget / result["processor_seconds"])), SCRATCH_EPOCHS)
            rates = ["--layer-decay", "1", "--lr", "4e-3", "--epochs", str(longer), "--patience", "40"]
            result = recipe_run(FINETUNE, folder / f"scratch-{share:g}", [*words, *rates])
        scores[f"{share:.0%}"] = result["accuracy_top1"]
    return scores


def costs(shares: list[float], rounds: int = 3) -> str:
    """The Markdown table of the processor time of MAE's encoder and step by the share of masked patches."""
    torch.manual_seed(0)
    backbone = backbones.build("vitkit:vit", embed_dim=192, depth=6, num_heads=3, dropout=0.0, pool="mean", positions="sincos2d")
    model, images = build_method("mae", backbone), torch.randn(64, 3, 32, 32)
    order = torch.rand(64, backbone.num_patches).argsort(dim=1)
    rows: dict[float, list[float]] = {}
    for share in shares:
        model.num_masked = round(share * backbone.num_patches)
        keep = order[:, model.num_masked :]
        calls = [lambda keep=keep: backbone(images, keep=keep).square().mean()]
        calls += [lambda: model({"images": images})["loss"]] if model.num_masked else []
        rows[share] = [seconds_of(call, rounds) for call in calls]
    first = rows[shares[0]][0]
    lines = ["| masked | encoder | encoder, decoder and loss |", "|---|---|---|"]
    for share, seconds in rows.items():
        cells = [f"{second / first:.2f} ({1e3 * second / 64:.1f} ms an image)" for second in seconds]
        lines.append(f"| {share:.0%} | " + " | ".join([*cells, ""][:2]) + " |")
    return "\n".join(lines)


def seconds_of(call: Callable[[], torch.Tensor], rounds: int) -> float:
    """The median processor time of a call and its backward pass, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            value = call()
        value.backward()
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def cell(values: list[float], digits: int = 4) -> str:
    """A value, or mean (least–most) of several seeds; empty for none."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(rows: Mapping[str, list[Mapping[str, float]]], shares: list[float]) -> str:
    """The Markdown table of rows with one result a seed."""
    columns = {**COLUMNS, **{f"fine-tuned, {share:.0%} of the labels": f"{share:.0%}" for share in shares}}
    lines = ["| method | " + " | ".join(columns) + " | epochs | processor time |", "|" + "---|" * (len(columns) + 3)]
    for name, results in rows.items():
        cells = [cell([r[key] for r in results if key in r], 1 if key == "val_rankme" else 4) for key in columns.values()]
        seconds = [r["processor_seconds"] for r in results if "processor_seconds" in r]
        epochs = [r["epochs"] for r in results if "epochs" in r]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {cell(epochs, 0)} | {cell(seconds, 0) + ' s' if seconds else ''} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks ssl", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seconds", type=float, default=3600.0, help="processor seconds of training for each method")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--finetune", nargs="*", type=float, default=[], metavar="SHARE", help="shares of the labels")
    parser.add_argument("--cost", action="store_true", help="print what masking saves, and train nothing")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 0.9], help="masked shares for --cost")
    parser.add_argument("--out", type=Path, default=Path("runs/ssl"))
    split = words.index("--") if "--" in words else len(words)
    given, more = parser.parse_args(words[:split]), words[split + 1 :]
    if given.finetune and not FINETUNE.exists():
        parser.error(f"--finetune needs {FINETUNE}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if given.cost:
        return print(f"{costs(given.shares)}\n\n{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    flags = {"dataset": given.dataset, **recipe_flags(more)}
    rows: dict[str, list[Mapping[str, float]]] = {}
    for seed in range(given.seeds):
        for method in given.methods:
            folder = given.out / f"{method}-{seed}"
            if (folder / "epochs.json").exists():
                epochs = json.loads((folder / "epochs.json").read_text())
            else:
                epochs = epochs_for(method, flags, given.seconds)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "epochs.json").write_text(json.dumps(epochs))
            training = ["--dataset", given.dataset, "--method", method, "--epochs", str(epochs), "--seed", str(seed), *more]
            result = {**recipe_run(RECIPE, folder / "run", training), "epochs": float(epochs)}
            result |= finetuned(folder / "run", folder, given.finetune, ["--dataset", given.dataset, "--seed", str(seed)], 0.0)
            rows.setdefault("with labels" if method == "supervised" else method, []).append(result)
            print(json.dumps({"method": method, "seed": seed, **result}), file=sys.stderr, flush=True)
        folder = given.out / f"untrained-{seed}"
        if not (folder / "scores.json").exists():
            scores = untrained(flags, seed, folder)
            (folder / "scores.json").write_text(json.dumps(scores))
        scores = json.loads((folder / "scores.json").read_text())
        budget = given.seconds if given.finetune else 0.0
        scores |= finetuned(folder / "model", folder, given.finetune, ["--dataset", given.dataset, "--seed", str(seed)], budget)
        rows.setdefault("untrained network (fine-tuned: from scratch)" if given.finetune else "untrained network", []).append(scores)
        pixels = {name.removeprefix("pixels_"): value for name, value in scores.items() if name.startswith("pixels_")}
        rows.setdefault("raw pixels", []).append(pixels)
    print(table(rows, given.finetune))
    print(f"\n{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, seeds 0 to {given.seeds - 1}")


def recipe_flags(words: list[str]) -> dict[str, Any]:
    """The values of a recipe's flags in pairs of words, `--embed-dim 128`."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return parse_arguments([f"{flag.removeprefix('--').replace('-', '_')}={value}" for flag, value in pairs])
