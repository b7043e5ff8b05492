"""The recipes' own training steps and evaluations, as `vitkit run` trains them, on this processor and as if it had AVX2 only.

Each recipe runs with its defaults up to `run.fit`, which is replaced: the model, optimiser, schedule, precision, gradient clipping,
average of weights and augmented batches are those of a user's run, and so is the evaluation in the loop's body. Beside it runs the
peer's documented recipe for the same network (`peers.py`), per image, data included. Times are processor time, medians over the
rounds; only their ratios are comparable between machines.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from vitkit import Run, datasets
from vitkit.training.ema import ModelEma
from vitkit.training.recipe import Recipe

from .peers import lightly_lejepa, metric_learning, open_clip_pairs
from .timing import Options, Products, Row

RECIPES = Path(__file__).parents[2] / "recipes"
STUDIES: dict[str, tuple[str, dict[str, Any]]] = {
    "JEPA, digits": ("jepa_mnist.py", {"dataset": "digits"}),
    "JEPA, MNIST": ("jepa_mnist.py", {"dataset": "mnist"}),
    "VAE, MNIST": ("vae_mnist.py", {"dataset": "mnist"}),
    "VAE, CIFAR-10": ("vae_cifar10.py", {"dataset": "cifar10"}),
    "CLIP, CIFAR-100": ("clip_cifar100.py", {"dataset": "cifar100"}),
}
PEERS: dict[str, tuple[str, Callable[..., Iterator[Any]], int]] = {
    "JEPA, MNIST": ("timm and lightly", lightly_lejepa, 64),
    "VAE, MNIST": ("timm and pytorch-metric-learning", metric_learning, 64),
    "VAE, CIFAR-10": ("timm and pytorch-metric-learning", metric_learning, 64),
    "CLIP, CIFAR-100": ("open_clip", open_clip_pairs, 128),
}
"""For a study: the peer, its documented recipe, and the images of a step."""
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "VITKIT_CPU_ISA": "avx2",
}  # fmt: skip
"""What makes a processor with AVX-512 or AMX compute as an older one."""
PARTS = ("augmentation", "forward", "backward", "clipping", "optimiser", "average")


class Measured(Exception):
    """Leaves a recipe after its measurement."""


def measure(recipe: Path, flags: dict[str, Any], *, rounds: int, evaluate: bool = True) -> dict[str, Any]:
    """Medians in seconds of `PARTS` and `step`, `ceiling` (the step's products only) and `evaluation`, with `steps` and `epochs`."""
    loaded = Recipe(recipe, reserved=frozenset())
    requested = {n: None if n in loaded.preset_flags else flag.default for n, flag in loaded.flags.items()} | flags
    results: dict[str, Any] = {}

    def fit(run: Any, model: Any, batches: Any, *, epochs: int, optimizer: Any, **options: Any) -> Iterator[Any]:
        results.update(epochs=epochs, steps=epochs * len(batches), images=batches.batch_size, precision=run.session.precision)
        results.update(_steps(run, model, batches, optimizer, rounds, **options))
        if evaluate:
            began = time.process_time()
            yield _Epoch(run, epochs)
            results["evaluation"] = time.process_time() - began
        raise Measured

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Run, "fit", fit):
        run = Run(Path(folder) / "run", device="cpu")
        try:
            loaded.run(run, requested)
        except Measured:
            pass
        finally:
            run.discard()
    return results


class _Epoch(SimpleNamespace):
    """The last epoch of a run, as the body of a recipe's loop sees it."""

    def __init__(self, run: Any, epochs: int) -> None:
        super().__init__(run=run, number=epochs, epochs=epochs, step=1, losses={"loss": 0.0}, logged={})

    def due(self, every: int) -> bool:
        return True

    def log(self, *scores: Any, **values: float) -> None:
        """Nothing is recorded."""

    def evaluate(self, model: Any, data: Any, *evaluators: Any, split: str = "test") -> Any:
        from vitkit.models import feature_cache

        with self.run.autocast(), feature_cache():
            for evaluator in evaluators:
                scores = evaluator(model, data, split=split)
        return scores


def _steps(
    run: Any, model: Any, batches: Any, optimizer: Any, rounds: int, *, schedule: Any = None, clip: Any = None, ema: Any = None,
    **_: Any,
) -> dict[str, float]:  # fmt: skip
    average, stream = ModelEma(model, ema) if ema else None, _endless(batches)
    model.train()
    seconds: dict[str, list[float]] = {name: [] for name in (*PARTS, "step", "ceiling")}

    def step() -> list[float]:
        marks = [time.process_time()]

        def mark(call: Callable[[], Any]) -> Any:
            value = call()
            marks.append(time.process_time())
            return value

        def forward() -> Any:
            with run.autocast():
                return model(batch)["loss"]

        def optimise() -> None:
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()

        batch = mark(lambda: next(stream))
        loss = mark(forward)
        mark(loss.backward)
        mark(lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else None)
        mark(optimise)
        mark(lambda: average.update(model) if average is not None else None)
        return marks

    step()
    products = Products.of(step)
    for _round in range(rounds):
        marks = step()
        for name, first, last in zip(PARTS, marks, marks[1:], strict=False):
            seconds[name].append(last - first)
        seconds["step"].append(marks[-1] - marks[0])
        began = time.process_time()
        products()
        seconds["ceiling"].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peer_seconds(name: str, rounds: int) -> float:
    """Median processor seconds for an image in the peer's documented recipe, data included."""
    _, recipe, images = PEERS[name]
    steps, marks = recipe(datasets.build(STUDIES[name][1]["dataset"])), []
    for _ in range(rounds + 2):
        next(steps)
        marks.append(time.process_time())
    return statistics.median(last - first for first, last in itertools.pairwise(marks[1:])) / images


def _endless(batches: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch, seed=0)
        epoch += 1


def line(name: str, isa: str, m: dict[str, Any]) -> Row:
    """A row: the step, its parts as shares, and the share of the ceiling."""
    around = m["augmentation"] + m["optimiser"] + m["average"]
    parts = ", ".join(f"{part} {m[part] / m['step']:.0%}" for part in PARTS)
    total = m["steps"] * m["step"] + m.get("evaluation", 0.0)
    what = f"{isa}, {m['precision']}: step of {1e3 * m['step']:.0f} ms; {parts}"
    evaluated = (
        f"evaluation {m['evaluation']:.1f} s, {m['evaluation'] / total:.0%} of a run with one"
        if "evaluation" in m
        else ""
    )
    peer, ratio = evaluated, ""
    if "peer" in m:
        ratio = f"{m['peer'] * m['images'] / m['step']:.2f}"
        peer = "; ".join(filter(None, [evaluated, f"peer: {PEERS[name][0]}"]))
    return Row(name, what, f"{around / m['step']:.0%} around the network", ratio, ceiling=f"{m['ceiling'] / m['step']:.0%}",
               wanted="≤ 12 %, ≥ 75 %", peer=peer)  # fmt: skip


def rows(options: Options) -> list[Row]:
    """Two rows a recipe: this processor as it is, and as AVX2."""
    table = []
    for name in STUDIES:
        for isa, variables in (("as it is", {}), ("AVX2", AVX2)):
            command = [
                sys.executable,
                "-m",
                f"{__package__}.recipes",
                name,
                str(options.rounds),
                str(options.threads),
                str(int(not options.quick)),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **variables}
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            table.append(line(name, isa, json.loads(output.splitlines()[-1])))
    return table


def main() -> None:
    name, (rounds, threads, evaluate) = sys.argv[1], map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    file, flags = STUDIES[name]
    measured = measure(RECIPES / file, flags, rounds=rounds, evaluate=bool(evaluate))
    if name in PEERS:
        measured["peer"] = peer_seconds(name, rounds)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
