"""The multi-task VAE's step from uint8 images on, in its original form and in vitkit's, on ViT 192/6/3 at 64 tokens.

A step takes one batch of anchors from uint8 images to updated weights: augmenting, the forward and backward pass with all
four losses and the decoder, AdamW. The peer loads anchors, positives and negatives through a DataLoader with two workers that
transform image by image with torchvision, and encodes them with timm's blocks in three separate passes. vitkit augments whole
batches and mines triplets in one pass, or, in the second row, in three. All sides start from the same weights. Seconds are the
wall's, for the peer's workers work beside it.
"""

import statistics
import time
from collections.abc import Iterator
from itertools import chain, repeat

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vitkit.data import ImageSplit, Preprocessing
from vitkit.transforms import Compose, HorizontalFlip, RandomAffine
from vitkit_vae import ConvDecoder, MultiTaskVAE, TripletBatches, VAEEncoder
from vitkit_vit import MLPHead

from .timing import Call, Options, Row, in_turn, share, times, training_step

SIZE, CLASSES = 32, 10
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
AUGMENT = Compose([HorizontalFlip(), RandomAffine(degrees=10, translate=0.1, scale=(0.9, 1.1))])


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


def network(*, timm: bool = False, decoder: bool = True) -> MultiTaskVAE:
    torch.manual_seed(0)
    backbone = VAEEncoder(img_size=SIZE, embed_dim=192, depth=6, num_heads=3, positions="learned")
    classifier = MLPHead(in_dim=backbone.embedding_dim, out_dim=CLASSES)
    made = ConvDecoder(in_dim=backbone.latent_dim, out_dim=3, img_size=SIZE) if decoder else None
    if timm:
        backbone.vit = TimmViT(backbone)
    return MultiTaskVAE(backbone, classifier, made, mean=MEAN, std=STD)


def stepper(model: MultiTaskVAE, batches: Iterator[dict[str, Tensor]], *, bf16: bool) -> Call:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return training_step(model, lambda: model(next(batches))["loss"], optimizer, bf16=bf16)


def loaded(images: Tensor, labels: Tensor, samples: int) -> Iterator[dict[str, Tensor]]:
    loader = DataLoader(
        Triplets(images, labels), samples, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    names = ("images", "positives", "negatives", "labels")
    return (dict(zip(names, batch, strict=True)) for batch in chain.from_iterable(repeat(loader)))


def drawn(images: Tensor, labels: Tensor, samples: int, *, given: bool = False) -> Iterator[dict[str, Tensor]]:
    split = ImageSplit(images, labels, Preprocessing((3, SIZE, SIZE), MEAN, STD))
    one = TripletBatches(split, samples, augment=AUGMENT)
    made = one if given else split.batches(samples, shuffle=True, drop_last=True, augment=AUGMENT)
    return chain.from_iterable(map(made.epoch, range(10**6)))


def rows(options: Options) -> list[Row]:
    count = 16 if options.quick else 64
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4096, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (4096,))
    data = images, labels, count
    steps = {
        "documented": stepper(network(timm=True), loaded(*data), bf16=False),
        "tuned": stepper(network(timm=True), loaded(*data), bf16=True),
        "mined": stepper(network(), drawn(*data), bf16=True),
        "without": stepper(network(decoder=False), drawn(*data), bf16=True),
        "given": stepper(network(), drawn(*data, given=True), bf16=True),
    }
    seconds = in_turn(steps, options.rounds, time.perf_counter)
    peer, what = "timm's ViT in three passes, torchvision in a DataLoader", f"step from uint8 images on, {count} anchors"
    found = [
        Row(
            "VAE", f"{what}, {how}", f"{count / statistics.median(seconds[name]):.0f} anchors/s",
            times(seconds, "documented", name), times(seconds, "tuned", name), "", wanted, peer,
        )
        for name, how, wanted in (("mined", "triplets mined", "≥ 2"), ("given", "three passes", ""))
    ]
    without = share(seconds, "without", "mined")
    return [*found, Row("VAE", "the same without reconstruction", f"{without} of the time", wanted="≥ 77 %")]
