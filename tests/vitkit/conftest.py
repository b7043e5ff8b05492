"""A run directory as the runner writes it, without running anything; a Hub for the real client."""

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, serving
from PIL import Image

from vitkit import backbones, heads
from vitkit.models.saving import save

RECIPE = '"""A tiny model of digits.\n\nIt is here to be published.\n"""\n\n\ndef main(run):\n    raise SystemExit("never run")\n'


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("name", epochs=6, losses=[...], metrics=[...], seed=1)`: other keywords go into the summary."""

    def make(
        name: str = "run",
        epochs: int = 6,
        losses: list[dict[str, Any]] | None = None,
        metrics: list[dict[str, Any]] | None = None,
        **summary: Any,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        decay = [math.exp(-epoch / 2) for epoch in range(1, epochs + 1)]
        if losses is None:
            losses = [
                {"epoch": e, "step": 10 * e, "loss": d, "invariance": d / 2, "sigreg": 1.1 + 40 * d, "lr": 1e-3,
                 "images_per_second": 3000.0, "seconds": 2.0 * e} for e, d in enumerate(decay, 1)
            ]  # fmt: skip
        if metrics is None:
            metrics = [
                {"epoch": e, "step": 10 * e, "loss": d, "linear_top1": 0.97 - 0.3 * d, "m1_top1": 0.9 - d, "m1_top3": 0.95 - d}
                for e, d in enumerate(decay, 1) if e % 2 == 0 or e == epochs
            ]  # fmt: skip
        _write(directory / "losses.csv", losses)
        _write(directory / "metrics.csv", metrics)
        last = {k: v for k, v in (metrics[-1] if metrics else {}).items() if k not in ("epoch", "step")}
        protocol = {"split": "test", "samples": 10_000, "chance": 0.1, "frozen": "encoder", "note": "on every pixel",
                    "kind": "proportion", "unit": "", "direction": "max", "untrained": None}
        told: dict[str, Any] = {
            "recipe": "jepa_mnist",
            "status": "finished",
            "dataset": {"name": "mnist", "asked": "auto", "fallback_for": None, "notice": "", "shape": [1, 28, 28],
                        "classes": [str(digit) for digit in range(10)], "train": 60_000, "test": 10_000,
                        "source": "somewhere", "licence": "CC BY-SA 3.0"},
            "seed": 0,
            "arguments": {"epochs": epochs, "lr": 1e-3, "label_fraction": None},
            "settings": {"device": "cpu", "precision": "bf16", "seed": summary.get("seed", 0)},
            "final": last,
            "best": {metric: {"value": value, "epoch": epochs} for metric, value in last.items()},
            "protocols": {metric: protocol for metric in last if metric != "loss"},
            "references": {"paper": {"linear_top1": 0.95, "m1_top1": 0.79},
                           "floor": {"sigreg": 1.0525}, "collapse": {"sigreg": 51.4}},
            "parameters": 2_745_856, "epochs": epochs, "steps": 10 * epochs, "seconds": 405.0,
            "images_per_second": 3000.0, "versions": {"python": "3.11.7", "vitkit": "0.1.0"},
            "started": "2026-01-02T03:04:05+0000", "command": "vitkit run recipes/jepa_mnist.py --seed 0",
        }  # fmt: skip
        (directory / "summary.json").write_text(json.dumps({**told, **summary}), encoding="utf-8")
        return directory

    return make


@pytest.fixture
def model_run(make_run: Callable[..., Path]) -> Path:
    """A finished run that saved a tiny model, with everything that a run leaves behind."""
    run = make_run("jepa")
    modules = {
        "backbone": backbones.build("vit", img_size=8, in_chans=1, embed_dim=8, depth=1, num_heads=2),
        "projector": heads.build("mlp", in_dim=8, out_dim=4),
    }
    preprocessing = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "pad"}
    save(run, modules, preprocessing=preprocessing, classes=["a", "b"], arguments={"lr": 0.1})
    (run / "recipe.py").write_text(RECIPE)
    (run / "log.txt").write_text("a line of the log\n")
    for folder in ("plots", "checkpoints"):
        (run / folder).mkdir()
    (run / "checkpoints" / "last.safetensors").write_bytes(bytes(100))
    for number, name in enumerate(("losses", "m1_confusion")):
        Image.new("RGB", (40, 40), (number, 90, 120)).save(run / "plots" / f"{name}.png")
    return run


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub where the token in HF_TOKEN belongs to `me`; its cache is `tmp_path/cache`."""
    with serving(tmp_path, monkeypatch) as server:
        yield server
