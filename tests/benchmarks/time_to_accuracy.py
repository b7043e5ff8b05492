"""Processor seconds until a model is accurate, for vitkit's recipe and for the same network trained by a peer's documented recipe.

    python -m tests.benchmarks time-to-accuracy [mnist ...] [--seconds 1800] [--every 60] [--out FILE]

Both train on the same images with the same network, and are evaluated by vitkit's evaluator on the test split, on one thread of this
processor. The seconds of evaluations do not count. A side that is not there after `--seconds` is given as "> seconds".

- `mnist`: linear probe 0.98. vitkit: `jepa_mnist.py` with its quick preset. Peer: timm's ViT and a projector of the same sizes with
  lightly's LeJEPALoss of two views, AdamW with lr 5e-4 and weight decay 0.05, batch 64, 50 epochs, fp32, as in lightly's example
  `examples/pytorch/lejepa.py`, plus a cosine schedule after one epoch of warm-up. Its DINO crops are for photographs: the views are
  torchvision's RandomAffine of each image in the DataLoader, with the recipe's own ranges.
- `cifar10`: accuracy 0.75. vitkit: `vae_cifar10.py`. Peer: timm's ViT with a linear classifier and pytorch-metric-learning's
  TripletMarginLoss, AdamW with lr 1e-4, batch 64.
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from vitkit import Run, backbones, evaluators, heads
from vitkit.training import warmup_cosine
from vitkit.training.recipe import Recipe

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


class Views:
    """Two augmented views of an image, one image at a time, as torchvision's documentation shows it."""

    def __init__(self, mean: float, std: float) -> None:
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10), transforms.ToTensor(),
            transforms.Normalize((mean,), (std,)),
        ])  # fmt: skip

    def __call__(self, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([torch.stack([self.transform(image) for _ in range(2)]) for image, _ in rows])


class TimmEncoder(nn.Module):
    """A timm network as vitkit's evaluators take it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def encode_image(self, images: Tensor) -> Tensor:
        return self.network(images)


def lightly_lejepa(data: Any, epochs: int = 50, batch_size: int = 64) -> Iterator[nn.Module]:
    """timm's ViT of the quick preset's size with lightly's LeJEPA loss, yielded after each step."""
    import timm
    from lightly.loss import LeJEPALoss

    torch.manual_seed(0)
    network = timm.models.VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, embed_dim=128, depth=4, num_heads=2, num_classes=0, global_pool="avg"
    )
    model, projector = TimmEncoder(network), heads.build("mlp", in_dim=128, out_dim=32, hidden=256, norm="batch")
    objective = LeJEPALoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *projector.parameters()], lr=5e-4, weight_decay=0.05)
    images = TensorDataset(data.train.images, data.train.labels)
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True, collate_fn=Views(data.mean[0], data.std[0]))
    schedule = warmup_cosine(optimizer, epochs * len(loader), warmup=len(loader))
    for _epoch in range(epochs):
        for views in loader:  # (b 2 c h w)
            model.train()
            z = projector(model.encode_image(views.flatten(0, 1))).unflatten(0, (-1, 2))
            objective(local_proj=z[:, 1:].transpose(0, 1), global_proj=z[:, :1].transpose(0, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield model


def metric_learning(data: Any, epochs: int = 100, batch_size: int = 64) -> Iterator[nn.Module]:
    """vitkit's `vit` of the recipe's size with pytorch-metric-learning's triplets, yielded after each step."""
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    torch.manual_seed(0)
    model: Any = backbones.build("vit", img_size=data.shape[-1], in_chans=data.shape[0], depth=6, dropout=0.0)
    objective, miner = TripletMarginLoss(margin=0.2), TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = data.train.batches(batch_size, shuffle=True, drop_last=True)
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            model.train()
            features = model.encode_image(batch["images"])
            objective(features, batch["labels"], miner(features, batch["labels"])).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield model


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
