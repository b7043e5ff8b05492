"""How fast augmented batches come, beside torchvision's transforms of one image at a time in a DataLoader, and kornia's.

    python tests/benchmarks/data_path.py [--workers 2] [--rounds 5] [--seconds 2]

All do the same operations on the same memory-mapped images, with the same torch threads, in turns within one process:
readings of a shared machine move, their ratios hardly do. kornia's, which take whole batches, are given vitkit's own
batches. The last table sets augmentation beside a training step.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import kornia.augmentation as kornia
import torch
from kornia.augmentation.auto import RandAugment as KorniaRandAugment
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms as tv

from vitkit import backbones
from vitkit.augment import (
    ColorJitter,
    Compose,
    HorizontalFlip,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomResizedCrop,
    Transform,
)
from vitkit.data import ImageSplit, Stored, from_store, read_store, write_store

BATCH = 256
JITTER, HUE = (0.4, 0.4, 0.4, 0.0), (0.4, 0.4, 0.4, 0.1)
PIPELINES: dict[str, tuple[int, int, Transform, list[Callable], list[nn.Module]]] = {
    # name: channels, side; vitkit's, torchvision's, kornia's
    "affine, 1×28×28": (
        1,
        28,
        Compose([RandomAffine(15, 0.1, (0.85, 1.15), 10)]),
        [tv.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10, interpolation=tv.InterpolationMode.BILINEAR)],
        [kornia.RandomAffine(15.0, (0.1, 0.1), (0.85, 1.15), 10.0, p=1.0)],
    ),
    "padded crop, flip, 3×32×32": (
        3,
        32,
        Compose([RandomCrop(4), HorizontalFlip()]),
        [tv.RandomCrop(32, 4), tv.RandomHorizontalFlip()],
        [kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip()],
    ),
    "resized crop, flip, jitter": (
        3,
        32,
        Compose([RandomResizedCrop((0.3, 1.0)), HorizontalFlip(), ColorJitter(*JITTER)]),
        [tv.RandomResizedCrop(32, (0.3, 1.0)), tv.RandomHorizontalFlip(), tv.ColorJitter(*JITTER)],
        [
            kornia.RandomResizedCrop((32, 32), (0.3, 1.0)),
            kornia.RandomHorizontalFlip(),
            kornia.ColorJitter(*JITTER, p=1.0),
        ],
    ),
    "the same, jitter with hue": (
        3,
        32,
        Compose([RandomResizedCrop((0.3, 1.0)), HorizontalFlip(), ColorJitter(*HUE)]),
        [tv.RandomResizedCrop(32, (0.3, 1.0)), tv.RandomHorizontalFlip(), tv.ColorJitter(*HUE)],
        [kornia.RandomResizedCrop((32, 32), (0.3, 1.0)), kornia.RandomHorizontalFlip(), kornia.ColorJitter(*HUE, p=1.0)],
    ),
    "padded crop, flip, RandAugment": (
        3,
        32,
        Compose([RandomCrop(4), HorizontalFlip(), RandAugment()]),
        [tv.RandomCrop(32, 4), tv.RandomHorizontalFlip(), tv.RandAugment()],
        [kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip(), KorniaRandAugment(n=2, m=9)],
    ),
}


class PerImage(TorchDataset):
    """The usual way: an image to PIL, transformed, made a tensor and normalised."""

    def __init__(self, split: ImageSplit, transforms: list[Callable]) -> None:
        self.split = split
        prepare = split.prepare
        self.transform = tv.Compose([*transforms, tv.ToTensor(), tv.Normalize(prepare.mean, prepare.std)])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.split.images[index].permute(1, 2, 0).numpy()
        return self.transform(Image.fromarray(image.squeeze())), int(self.split.labels[index])


def endless(epoch: Callable[[int], Iterator]) -> Iterator:
    number = 0
    while True:
        yield from epoch(number)
        number += 1


def rate(batches: Iterator, seconds: float) -> float:
    """Images a second, after what had been fetched in advance is used up."""
    for _ in range(8):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - began)


def made_up(channels: int, side: int) -> ImageSplit:
    """50,000 images in the store; what they show makes no difference here."""
    images = torch.randint(0, 256, (50_000, channels, side, side), dtype=torch.uint8)
    labels = torch.arange(50_000) % 10
    tensors = {"train.images": images, "train.labels": labels, "test.images": images[:1], "test.labels": labels[:1]}
    path = write_store(f"made-up-{channels}", tensors, [str(label) for label in range(10)])
    stored: Stored = read_store(path)
    return from_store(stored).train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VITKIT_DATA"] = folder
        splits = {channels: made_up(channels, side) for channels, side in ((1, 28), (3, 32))}
        against_others(splits, options)
        beside_a_step(splits[3], options)


def against_others(splits: dict[int, ImageSplit], options: argparse.Namespace) -> None:
    table = Table("augmentations", "vitkit images/s", "torchvision", "kornia", "× torchvision (lowest)", "× kornia (lowest)")
    for name, (channels, _, ours, theirs, kornias) in PIPELINES.items():
        split = splits[channels]
        whole = nn.Sequential(*kornias)
        loader: DataLoader = DataLoader(
            PerImage(split, theirs), BATCH, shuffle=True, drop_last=True,
            num_workers=options.workers, persistent_workers=options.workers > 0,
        )  # fmt: skip
        streams = (
            endless(split.batches(BATCH, shuffle=True, drop_last=True, augment=ours).epoch),
            endless(lambda _, loader=loader: iter(loader)),
            endless(split.batches(BATCH, shuffle=True, drop_last=True, augment=lambda x, _, whole=whole: whole(x)).epoch),
        )
        rates = [tuple(rate(stream, options.seconds) for stream in streams) for _ in range(options.rounds)]
        ratios = [sorted(row[0] / row[other] for row in rates) for other in (1, 2)]
        typical = [f"{statistics.median(column):,.0f}" for column in zip(*rates, strict=True)]
        table.add_row(name, *typical, *(f"{statistics.median(of):.1f} ({of[0]:.1f})" for of in ratios))
        del streams, loader
    console = Console(width=120)
    console.print(
        f"batches of {BATCH}; {torch.get_num_threads()} torch threads; DataLoader with {options.workers} workers"
    )
    console.print(table)


def beside_a_step(split: ImageSplit, options: argparse.Namespace) -> None:
    """Two views of each of 64 images, with the heaviest augmentations, and ViT 192/6/3 in bf16."""
    augment = PIPELINES["the same, jitter with hue"][2]
    stream = endless(split.batches(64, shuffle=True, drop_last=True, augment=augment, views=2).epoch)
    model = backbones.build("vit", img_size=32, patch_size=4, in_chans=3, embed_dim=192, depth=6, num_heads=3)
    seconds: dict[str, list[float]] = {"batch": [], "step": []}
    for _ in range(1 + 2 * options.rounds):
        began = time.perf_counter()
        images = next(stream)["images"].flatten(0, 1)
        between = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images).float().square().mean().backward()
        seconds["batch"].append(between - began)
        seconds["step"].append(time.perf_counter() - between)
    batch, step = (statistics.median(values[1:]) for values in seconds.values())
    table = Table("128 views, heaviest augmentations", "seconds", "views/s", title_justify="left")
    table.add_row("batch", f"{batch:.4f}", f"{128 / batch:,.0f}")
    table.add_row("forward and backward, ViT 192/6/3, bf16", f"{step:.4f}", f"{128 / step:,.0f}")
    table.add_row("share of the batch in both", f"{batch / (batch + step):.1%}", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
