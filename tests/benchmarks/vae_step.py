"""Training steps of the multi-task VAE on ViT 192/6/3 at 64 tokens: vitkit beside the same network on timm's blocks.

    python tests/benchmarks/vae_step.py [--samples 64] [--rounds 5] [--threads 2]

A step takes one batch of anchors from uint8 images to updated weights: augmenting, the forward and backward pass with all
four losses and the decoder, AdamW. timm's side loads anchors, positives and negatives through a DataLoader with two
workers that transform image by image with torchvision, and encodes them in three separate passes. vitkit augments whole
batches and mines triplets in one pass, or, in the last row, in three. All sides start from the same weights and take turns
in one process; the table gives medians. The second table is what reconstruction adds to a step of vitkit's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vitkit.augment import Compose, HorizontalFlip, RandomAffine
from vitkit.batches import ImageSplit, Preparation
from vitkit_vae import ConvDecoder, MultiTaskVAE, TripletBatches, VAEEncoder
from vitkit_vit import MLPHead

SIZE, CLASSES = 32, 10
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
AUGMENT = Compose([HorizontalFlip(), RandomAffine(degrees=10, translate=0.1, scale=(0.9, 1.1))])
Step = Callable[[], float]


class Triplets(Dataset[tuple[Tensor, ...]]):
    """An image, one of its class and one of another, each transformed by itself."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.transform = v2.Compose([
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ])  # fmt: skip
        self.members = [(labels == label).nonzero()[:, 0] for label in range(CLASSES)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        label = int(self.labels[index])
        other = (label + int(torch.randint(1, CLASSES, ()))) % CLASSES
        drawn = [index, *(int(one[torch.randint(len(one), ())]) for one in (self.members[label], self.members[other]))]
        return *(self.transform(self.images[number]) for number in drawn), self.labels[index]


class TimmViT(nn.Module):
    """timm's blocks in the place of `vit`."""

    def __init__(self, backbone: VAEEncoder) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=SIZE, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=0, global_pool="avg",
            class_token=False, fc_norm=False,
        )  # fmt: skip
        self.vit.load_state_dict(backbone.vit.state_dict())
        self.blocks = self.vit.blocks

    def encode_image(self, images: Tensor) -> Tensor:
        return self.vit(images)


def model(*, timm: bool = False, decoder: bool = True) -> MultiTaskVAE:
    torch.manual_seed(0)
    backbone = VAEEncoder(img_size=SIZE, embed_dim=192, depth=6, num_heads=3, positions="learned")
    classifier = MLPHead(in_dim=backbone.embedding_dim, out_dim=CLASSES)
    made = ConvDecoder(in_dim=backbone.latent_dim, out_dim=3, img_size=SIZE) if decoder else None
    if timm:
        backbone.vit = TimmViT(backbone)
    return MultiTaskVAE(backbone, classifier, made, mean=MEAN, std=STD)


def stepper(network: MultiTaskVAE, batches: Iterator[dict[str, Tensor]], *, bf16: bool) -> Step:
    """A call that makes a batch, takes one training step and returns the loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> float:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = network(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def loaded(images: Tensor, labels: Tensor, samples: int) -> Iterator[dict[str, Tensor]]:
    loader = DataLoader(
        Triplets(images, labels), samples, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    names = ("images", "positives", "negatives", "labels")
    return (dict(zip(names, batch, strict=True)) for batch in chain.from_iterable(repeat(loader)))


def drawn(images: Tensor, labels: Tensor, samples: int, *, given: bool = False) -> Iterator[dict[str, Tensor]]:
    split = ImageSplit(images, labels, Preparation((3, SIZE, SIZE), MEAN, STD))
    one = TripletBatches(split, samples, augment=AUGMENT)
    made = one if given else split.batches(samples, shuffle=True, drop_last=True, augment=AUGMENT)
    return chain.from_iterable(map(made.epoch, range(10**6)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="anchors a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4096, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (4096,))
    data = images, labels, given.samples
    sides = {
        "timm, three passes, DataLoader, fp32": stepper(model(timm=True), loaded(*data), bf16=False),
        "timm, three passes, DataLoader, bf16": stepper(model(timm=True), loaded(*data), bf16=True),
        "vitkit, mined in the batch, bf16": stepper(model(), drawn(*data), bf16=True),
        "vitkit, without reconstruction, bf16": stepper(model(decoder=False), drawn(*data), bf16=True),
        "vitkit, three passes, bf16": stepper(model(), drawn(*data, given=True), bf16=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in track(range(given.rounds + 1), "rounds", transient=True):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if number:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fp32, bf16, mined, without, _ = medians.values()
    table = Table(title=f"{given.samples} anchors a step, {given.threads} threads, {given.rounds} rounds")
    for column in ("", "anchors/s", "slowest … fastest", "× timm fp32", "× timm bf16"):
        table.add_column(column, justify="right" if column else "left")
    for name, median in medians.items():
        span = f"{given.samples / max(seconds[name]):.0f} … {given.samples / min(seconds[name]):.0f}"
        table.add_row(name, f"{given.samples / median:.0f}", span, f"{fp32 / median:.2f}", f"{bf16 / median:.2f}")
    Console().print(table)
    Console().print(f"reconstruction adds {mined / without - 1:.0%} to a step of vitkit's")


if __name__ == "__main__":
    main()
