"""Every architecture at three sizes on CIFAR-10 or CIFAR-100, trained by the same recipe for the same processor time.

    python -m tests.benchmarks architectures [cifar10 cifar100] [--seconds 1800] [--names vit cct convnext swin pvt mobilevit]
                                             [--sizes tiny small base] [--out architectures.md]

`recipes/finetune.py --model none` trains each backbone from scratch, with its defaults for colour images beside `--mix both` and
`--batch-size`. The number of epochs follows from the time of a step, which is measured before each training; evaluations are not
counted. Accuracy is that on the test split with the weights that were best on the validation
split; nothing is chosen on the test split. Each row is written when it is finished, and a second call with the same `--out` trains
only what is missing.

| column | what it is |
|---|---|
| parameters | of the backbone without classifier |
| MMACs | multiplications with an addition in the forward pass of one image, in millions, counted by torch |
| images/s | images that training steps take a second of processor time |
| processor time | of the whole run: training, evaluations and report |
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitkit import Run, backbones, datasets
from vitkit.runs import processor
from vitkit.training import Recipe

from .recipes import RECIPES, measure

RECIPE = RECIPES / "finetune.py"
VIT = {"patch_size": 4, "dropout": 0.0, "drop_path": 0.1, "pool": "mean", "positions": "sincos2d", "stem": "conv"}
BACKBONES: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {
        "tiny": VIT | {"embed_dim": 96, "depth": 4, "num_heads": 3},
        "small": VIT | {"embed_dim": 192, "depth": 5, "num_heads": 3},
        "base": VIT | {"embed_dim": 288, "depth": 6, "num_heads": 6},
    },
    "cct": {"tiny": {"preset": "2_3x2"}, "small": {"preset": "4_3x2", "embed_dim": 256, "num_heads": 4}, "base": {"preset": "7_3x1"}},
    **{
        name: {size: {"preset": f"{size}_32", "drop_path": 0.1} for size in ("tiny", "small", "base")}
        for name in ("convnext", "swin", "pvt", "mobilevit")
    },
}
COLUMNS = ("dataset", "backbone", "size", "test accuracy", "val accuracy", "parameters", "MMACs", "images/s", "epochs", "processor time")


def flags(dataset: str, name: str, size: str, **more: Any) -> dict[str, Any]:
    """The recipe's flags for one training."""
    arguments = [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in BACKBONES[name][size].items()]
    return {"dataset": dataset, "mix": "both", "backbone": f"vitkit:{name}", "backbone_arg": arguments} | more


def requested(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """All flags of a recipe: the given ones, and the defaults of the others."""
    return {name: None if name in recipe.preset_flags else flag.default for name, flag in recipe.flags.items()} | given


def model_facts(name: str, size: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Parameters and MMACs of a backbone for images `(c h w)`."""
    channels, height, _ = shape
    model = backbones.build(f"vitkit:{name}", img_size=height, in_chans=channels, **BACKBONES[name][size]).eval()
    # torch counts no fused attention on a CPU: on the meta device the products are counted.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta").encode_image(torch.zeros(1, channels, height, height, device="meta"))
    return {"parameters": sum(p.numel() for p in model.parameters()), "mmacs": counter.get_total_flops() / 2e6}


def trained(dataset: str, name: str, size: str, *, seconds: float, batch_size: int, extra: dict[str, Any]) -> dict[str, Any]:
    """One row: the training, its facts and its accuracy."""
    given = flags(dataset, name, size, batch_size=batch_size, **extra)
    timed = measure(RECIPE, given | {"epochs": 1}, rounds=8, evaluate=False)
    epoch = timed["step"] * timed["steps"]
    epochs = max(1, round(seconds / epoch))
    recipe = Recipe(RECIPE)
    with tempfile.TemporaryDirectory() as folder:
        run, began = Run(Path(folder) / "run", device="cpu", name="architectures", recipe=recipe), time.process_time()
        every = max(1, epochs // 10)
        recipe.run(run, requested(recipe, given | {"epochs": epochs, "eval_every": every, "patience": 10_000}))
        took = time.process_time() - began
        run.finish()
        final = json.loads((Path(folder) / "run" / "summary.json").read_text())["final"]
    facts = model_facts(name, size, datasets.build(dataset).shape)
    row = {"dataset": dataset, "backbone": name, "size": size, "test": final["accuracy_top1"], "val": final["val_accuracy_top1"]}
    return row | facts | {"rate": timed["images"] / timed["step"], "epochs": epochs, "seconds": took}


def line(row: dict[str, Any]) -> str:
    cells = (
        row["dataset"], row["backbone"], row["size"], f"{row['test']:.4f}", f"{row['val']:.4f}", f"{row['parameters']:,}",
        f"{row['mmacs']:.1f}", f"{row['rate']:.0f}", str(row["epochs"]), f"{row['seconds']:.0f} s",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def finished(out: Path) -> set[tuple[str, ...]]:
    """Dataset, backbone and size of the rows in the file."""
    rows = [text.split("|")[1:4] for text in out.read_text().splitlines() if text.startswith("| ")] if out.exists() else []
    return {tuple(cell.strip() for cell in row) for row in rows}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks architectures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="*", default=["cifar10", "cifar100"])
    parser.add_argument("--seconds", type=float, default=1800.0, help="processor seconds of each training")
    parser.add_argument("--names", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "small", "base"), default=["tiny", "small", "base"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-size", type=int, help="number of training images, for a quick trial  [default: all]")
    parser.add_argument("--out", type=Path, default=Path("architectures.md"))
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    if not given.out.exists():
        given.out.write_text("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n")
    extra = {} if given.train_size is None else {"train_size": given.train_size}
    for dataset in given.datasets:
        for name in given.names:
            for size in given.sizes:
                if (dataset, name, size) in finished(given.out):
                    continue
                row = trained(dataset, name, size, seconds=given.seconds, batch_size=given.batch_size, extra=extra)
                with given.out.open("a") as file:
                    file.write(line(row) + "\n")
                print(line(row), flush=True)
    print(f"\n{datetime.date.today()}, {processor()}; torch {torch.__version__}, {given.threads} thread(s), seed 0; {given.out}")
