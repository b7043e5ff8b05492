"""How fast augmented batches come, beside torchvision's transforms of one image at a time in a DataLoader, and kornia's.

All do the same operations on the same memory-mapped images, with the same torch threads, in turns within one process.
kornia's, which take whole batches, are given vitkit's own batches. Rates are of the wall: the DataLoader's two workers are
processes of their own. The last row sets augmentation beside a training step.
"""

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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms as tv

from vitkit import backbones
from vitkit.data import ImageSplit, Stored, from_store, read_store, write_store
from vitkit.transforms import (
    ColorJitter,
    Compose,
    HorizontalFlip,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomResizedCrop,
    Transform,
)

from .timing import Options, Row, in_turn, share

BATCH, WORKERS = 256, 2
JITTER, HUE = (0.4, 0.4, 0.4, 0.0), (0.4, 0.4, 0.4, 0.1)
PIPELINES: dict[str, tuple[str, int, int, Transform, list[Callable], list[nn.Module]]] = {
    # name: system, channels, side; vitkit's, torchvision's, kornia's
    "affine, 1×28×28": (
        "JEPA, VAE",
        1,
        28,
        Compose([RandomAffine(15, 0.1, (0.85, 1.15), 10)]),
        [tv.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10, interpolation=tv.InterpolationMode.BILINEAR)],
        [kornia.RandomAffine(15.0, (0.1, 0.1), (0.85, 1.15), 10.0, p=1.0)],
    ),
    "padded crop, flip, 3×32×32": (
        "CLIP, VAE",
        3,
        32,
        Compose([RandomCrop(4), HorizontalFlip()]),
        [tv.RandomCrop(32, 4), tv.RandomHorizontalFlip()],
        [kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip()],
    ),
    "resized crop, flip, jitter": (
        "any",
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
        "any",
        3,
        32,
        Compose([RandomResizedCrop((0.3, 1.0)), HorizontalFlip(), ColorJitter(*HUE)]),
        [tv.RandomResizedCrop(32, (0.3, 1.0)), tv.RandomHorizontalFlip(), tv.ColorJitter(*HUE)],
        [kornia.RandomResizedCrop((32, 32), (0.3, 1.0)), kornia.RandomHorizontalFlip(), kornia.ColorJitter(*HUE, p=1.0)],
    ),
    "padded crop, flip, RandAugment": (
        "CLIP, VAE",
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
        preprocessing = split.preprocessing
        self.transform = tv.Compose([*transforms, tv.ToTensor(), tv.Normalize(preprocessing.mean, preprocessing.std)])

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


def against_others(splits: dict[int, ImageSplit], options: Options) -> list[Row]:
    found = []
    for name, (system, channels, _, ours, theirs, kornias) in PIPELINES.items():
        split, whole = splits[channels], nn.Sequential(*kornias)
        loader: DataLoader = DataLoader(
            PerImage(split, theirs), BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
        )
        streams = (
            endless(split.batches(BATCH, shuffle=True, drop_last=True, augment=ours).epoch),
            endless(lambda _, loader=loader: iter(loader)),
            endless(split.batches(BATCH, shuffle=True, drop_last=True, augment=lambda x, _, whole=whole: whole(x)).epoch),
        )
        duration = 0.3 if options.quick else 1.0
        rates = [tuple(rate(stream, duration) for stream in streams) for _ in range(min(options.rounds, 3))]
        median = statistics.median(row[0] for row in rates)
        torchvision, by_kornia = ([row[0] / row[other] for row in rates] for other in (1, 2))
        cells = [f"{statistics.median(of):.1f} ({min(of):.1f}–{max(of):.1f})" for of in (torchvision, by_kornia)]
        found.append(
            Row(
                system, f"data: {name}", f"{median:,.0f} images/s", *cells, wanted="torchvision ≥ 8, kornia ≥ 2",
                peer="torchvision per image, 2 workers; kornia on batches",
            )
        )
        del streams, loader
    return found


def beside_a_step(split: ImageSplit, options: Options) -> Row:
    """Two views of each of 64 images, with the heaviest augmentations, and ViT 192/6/3 in bf16."""
    augment = PIPELINES["the same, jitter with hue"][3]
    stream = endless(split.batches(64, shuffle=True, drop_last=True, augment=augment, views=2).epoch)
    model = backbones.build("vit", img_size=32, patch_size=4, in_chans=3, embed_dim=192, depth=6, num_heads=3)
    images = next(stream)["images"].flatten(0, 1)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images).float().square().mean().backward()

    seconds = in_turn({"batch": lambda: next(stream), "step": step}, options.rounds, options.clock)
    batch = f"{1e3 * statistics.median(seconds['batch']):.0f} ms, {share(seconds, 'batch', 'step', 1)} of a step"
    return Row("any", "data: 128 views, jitter with hue", batch, wanted="< 5 %")


def rows(options: Options) -> list[Row]:
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    before = os.environ.get("VITKIT_DATA")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VITKIT_DATA"] = folder
        try:
            splits = {channels: made_up(channels, side) for channels, side in ((1, 28), (3, 32))}
            return [*against_others(splits, options), beside_a_step(splits[3], options)]
        finally:
            os.environ.pop("VITKIT_DATA")
            if before is not None:
                os.environ["VITKIT_DATA"] = before
