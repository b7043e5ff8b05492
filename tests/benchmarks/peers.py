"""The recipes of other libraries for the networks of vitkit's recipes, as these libraries document them; fp32, seed 0.

- `lightly_lejepa`: timm's ViT of the size of the quick preset and a projector, lightly's LeJEPALoss of two views, AdamW with lr 5e-4
  and weight decay 0.05, batch 64, 50 epochs, as in lightly's example `examples/pytorch/lejepa.py`, plus a cosine schedule after one
  epoch of warm-up. The example's DINO crops are for photographs. Here the views are torchvision's RandomAffine of each image in
  the DataLoader, with the ranges of vitkit's recipe.
- `metric_learning`: timm's ViT of the size of `vae_cifar10.py` (for MNIST: of `vae_mnist.py`), a linear classifier with cross-entropy,
  and the triplets of pytorch-metric-learning, mined in the batch; AdamW with lr 1e-4, batch 64, 100 epochs; torchvision's crop and flip
  of each image. It has no decoder.
- `open_clip_pairs`: the towers of `clip_cifar100.py` with open_clip's ClipLoss and learned temperature, and the flags of the training
  command in open_clip's README: AdamW with lr 1e-3, weight decay 0.1, β = (0.9, 0.98), ε = 1e-6, batch 128, 30 epochs, and a cosine
  schedule. Its warm-up of 10,000 steps, as long as the whole training here, is shortened to one epoch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from vitkit import Component, heads
from vitkit.training import warmup_cosine
from vitkit_clip import AUGMENTS, Pairs, build_clip


class Views:
    """`count` augmented views of an image and its label, one image at a time, as torchvision's documentation shows it."""

    def __init__(self, data: Any, count: int, *augment: Callable[[Any], Any]) -> None:
        self.count = count
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), *augment, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        )

    def __call__(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        views = torch.stack([torch.stack([self.transform(image) for _ in range(self.count)]) for image, _ in rows])
        return views, torch.stack([label for _, label in rows])


class TimmEncoder(nn.Module):
    """A timm network as vitkit's evaluators take it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        import timm

        self.network = timm.models.VisionTransformer(**arguments, num_classes=0, global_pool="avg")

    def encode_image(self, images: Tensor) -> Tensor:
        return self.network(images)


def loader(data: Any, batch_size: int, views: Views) -> DataLoader[Any]:
    """The training images in random order, prepared one by one."""
    images = TensorDataset(data.train.images, data.train.labels)
    return DataLoader(images, batch_size, shuffle=True, drop_last=True, collate_fn=views)


def lightly_lejepa(data: Any, epochs: int = 50, batch_size: int = 64) -> Iterator[nn.Module]:
    """timm's ViT with lightly's LeJEPA loss, yielded after each step."""
    from lightly.loss import LeJEPALoss

    torch.manual_seed(0)
    model = TimmEncoder(img_size=28, patch_size=7, in_chans=1, embed_dim=128, depth=4, num_heads=2)
    projector = heads.build("mlp", in_dim=128, out_dim=32, hidden=256, norm="batch")
    objective = LeJEPALoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *projector.parameters()], lr=5e-4, weight_decay=0.05)
    batches = loader(data, batch_size, Views(data, 2, transforms.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10)))
    schedule = warmup_cosine(optimizer, epochs * len(batches), warmup=len(batches))
    for _epoch in range(epochs):
        for views, _labels in batches:  # (b 2 c h w)
            model.train()
            z = projector(model.encode_image(views.flatten(0, 1))).unflatten(0, (-1, 2))
            objective(local_proj=z[:, 1:].transpose(0, 1), global_proj=z[:, :1].transpose(0, 1)).backward()
            advance(optimizer, schedule)
            yield model


def metric_learning(data: Any, epochs: int = 100, batch_size: int = 64) -> Iterator[nn.Module]:
    """timm's ViT with cross-entropy and pytorch-metric-learning's triplets, yielded after each step."""
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    torch.manual_seed(0)
    channels, size, _ = data.shape
    patch = 7 if size == 28 else 4
    model = TimmEncoder(img_size=size, patch_size=patch, in_chans=channels, embed_dim=128, depth=4, num_heads=2)
    classifier = nn.Linear(128, len(data.classes))
    objective, miner = TripletMarginLoss(margin=0.2), TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=1e-4)
    batches = loader(data, batch_size, Views(data, 1, transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip()))
    for _epoch in range(epochs):
        for views, labels in batches:
            model.train()
            features = model.encode_image(views[:, 0])
            triplets = objective(features, labels, miner(features, labels))
            (triplets + F.cross_entropy(classifier(features), labels)).backward()
            advance(optimizer)
            yield model


def open_clip_pairs(data: Any, epochs: int = 30, batch_size: int = 128) -> Iterator[nn.Module]:
    """The towers of vitkit's recipe with open_clip's loss and flags, yielded after each step."""
    from open_clip import ClipLoss

    torch.manual_seed(0)
    text, unused = Component("backbone", "vitkit:text_transformer"), Component("loss", "vitkit:info_nce")
    model = build_clip(data, tower="best", text=text, loss=unused, proj_dim=256, classify=0.0, label_smoothing=0.0)
    scale, objective = nn.Parameter(torch.tensor(1 / 0.07).log()), ClipLoss()
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [scale, *(p for p in weights if p.ndim < 2)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    batches = Pairs(data.train, data.classes, batch_size, augment=AUGMENTS["crop"], drop_last=True)
    schedule = warmup_cosine(optimizer, epochs * len(batches), warmup=len(batches))
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            model.train()
            (image,), caption = model.embed_images(batch["images"]), model.embed_labels(batch["labels"])
            objective(F.normalize(image, dim=-1), F.normalize(caption, dim=-1), scale.exp()).backward()
            advance(optimizer, schedule)
            scale.data.clamp_(0, torch.tensor(100.0).log())
            yield model


def advance(optimizer: torch.optim.Optimizer, schedule: Any = None) -> None:
    """One step of the optimiser and the schedule."""
    optimizer.step()
    optimizer.zero_grad()
    if schedule is not None:
        schedule.step()
