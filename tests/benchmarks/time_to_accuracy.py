"""Processor seconds until a model is accurate, for vitkit's recipe and for the same network trained by a peer's documented recipe.

    python -m tests.benchmarks time-to-accuracy [mnist ...] [--seconds 1800] [--every 60] [--out FILE]

Both train on the same images with the same network, and are evaluated by vitkit's evaluator on the test split, on one thread of this
processor. The seconds of evaluations do not count. A side that is not there after `--seconds` is given as "> seconds".

- `mnist`: linear probe 0.98. vitkit: `jepa_mnist.py` with its quick preset. Peer: timm and lightly.
- `cifar10`: kNN 0.75. vitkit: `vae_cifar10.py`. Peer: timm and pytorch-metric-learning.
- `cifar100`: top-1 of image → caption 0.2. vitkit: `clip_cifar100.py`. Peer: open_clip.

`peers.py` describes the peers.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from vitkit import Run, evaluators
from vitkit.training.recipe import Recipe

from .peers import lightly_lejepa, metric_learning, open_clip_pairs
from .recipes import RECIPES


@dataclass(frozen=True)
class Target:
    """What is trained until which metric is reached."""

    recipe: str
    flags: dict[str, Any]
    metric: str
    accuracy: float
    peer: Callable[[Any], Iterator[nn.Module]]
    evaluate: Callable[[nn.Module, Any], float]


class Clock:
    """Processor seconds of training: it stands still while a model is evaluated."""

    def __init__(self) -> None:
        self.began, self.paused = time.process_time(), 0.0

    def seconds(self) -> float:
        return time.process_time() - self.began - self.paused

    def pause(self, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        value = call()
        self.paused += time.process_time() - began
        return value


class Reached(Exception):
    """Leaves a recipe: it is accurate, or its time is over."""


def vitkit_seconds(target: Target, limit: float) -> list[tuple[float, float]]:
    """(processor seconds, accuracy) after each evaluation of the recipe; the schedule is the recipe's own."""
    points: list[tuple[float, float]] = []
    recipe = Recipe(RECIPES / target.recipe, reserved=frozenset())
    flags = {n: None if n in recipe.preset_flags else flag.default for n, flag in recipe.flags.items()} | target.flags
    original, clock = Run.fit, Clock()

    def fit(run: Any, *positional: Any, **options: Any) -> Iterator[Any]:
        nonlocal clock
        clock = Clock()  # what was built before the training does not count
        for epoch in original(run, *positional, **options):
            before, paused = time.process_time(), clock.seconds()
            yield epoch
            clock.paused += time.process_time() - before
            if target.metric in epoch.logged:
                points.append((paused, epoch.logged[target.metric]))
                print(json.dumps({"vitkit": points[-1]}), flush=True)
                if points[-1][1] >= target.accuracy or paused > limit:
                    raise Reached

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Run, "fit", fit):
        run = Run(Path(folder) / "run", device="cpu")
        try:
            recipe.run(run, flags)
        except Reached:
            pass
        finally:
            run.discard()
    return points


def peer_seconds(target: Target, data: Any, limit: float, every: float) -> list[tuple[float, float]]:
    """The same for the peer, evaluated each `every` processor seconds."""
    points: list[tuple[float, float]] = []
    clock, due = Clock(), every
    for model in target.peer(data):
        if clock.seconds() < due:
            continue
        seconds, due = clock.seconds(), clock.seconds() + every
        accuracy = clock.pause(lambda model=model: target.evaluate(model, data))
        points.append((seconds, accuracy))
        print(json.dumps({"peer": points[-1]}), flush=True)
        if accuracy >= target.accuracy or seconds > limit:
            break
    return points


def metric_of(name: str, metric: str) -> Callable[[nn.Module, Any], float]:
    """One metric of a registered evaluator."""
    return lambda model, data: float(evaluators.build(name)(model.eval(), data)[metric])


TARGETS = {
    "mnist": Target(
        "jepa_mnist.py", {"dataset": "mnist", "eval_every": 1}, "linear_top1", 0.98, lightly_lejepa,
        metric_of("linear_probe", "linear_top1"),
    ),
    "cifar10": Target(
        "vae_cifar10.py", {"dataset": "cifar10", "eval_every": 1}, "knn_top1", 0.75, metric_learning, metric_of("knn", "knn_top1"),
    ),
    "cifar100": Target(
        "clip_cifar100.py", {"dataset": "cifar100", "eval_every": 1}, "i2t_top1", 0.2, open_clip_pairs,
        metric_of("pair_retrieval", "i2t_top1"),
    ),
}  # fmt: skip


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks time-to-accuracy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", default=["mnist"], help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--side", choices=("both", "vitkit", "peer"), default="both")
    parser.add_argument("--seconds", type=float, default=1800.0, help="processor seconds of training after which a side ends")
    parser.add_argument("--every", type=float, default=60.0, help="processor seconds between the peer's evaluations")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    for name in given.names:
        target, times = TARGETS[name], {}
        for side in ("vitkit", "peer") if given.side == "both" else (given.side,):
            if side == "vitkit":
                points = vitkit_seconds(target, given.seconds)
            else:
                from vitkit import datasets

                data: Any = datasets.build(target.flags["dataset"])
                points = peer_seconds(target, data, given.seconds, given.every)
            reached = [seconds for seconds, accuracy in points if accuracy >= target.accuracy]
            times[side] = reached[0] if reached else None
        cells = {side: f"{value:.0f} s" if value else f"> {given.seconds:.0f} s" for side, value in times.items()}
        print(f"| {name} | {target.metric} {target.accuracy} | " + " | ".join(f"{k}: {v}" for k, v in cells.items()) + " |")
