"""BYOL: a network predicts, from one view of an image, the features that its momentum teacher has of another view."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import Run, backbones, evaluators, heads
from vitkit.contracts import Dataset
from vitkit.data import View
from vitkit.training import MomentumTeacher, adamw, cosine, warmup_cosine
from vitkit.transforms import ColorJitter, Compose, GaussianBlur, Grayscale, HorizontalFlip, RandomResizedCrop, Solarize


class BYOL(nn.Module):
    """Batches with two `views` → {"loss"}: 2 − 2·cos(q(student(v)), teacher(v')), the mean over both orders of the views.

    Source: Grill et al., arXiv 2006.07733.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module, *, momentum: float) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor
        self.teacher = MomentumTeacher(nn.Sequential(Pooled(backbone), projector), cosine(momentum, 1.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.backbone.encode_image(images)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        views = torch.cat([view[:, 0] for view in batch["views"]])  # (2·b c h w)
        predicted = self.predictor(self.projector(self.encode_image(views)))
        target = self.teacher(views).roll(len(views) // 2, dims=0)  # the other view of each image
        return {"loss": 2 - 2 * F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()}

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """Of a prediction in a random direction: its cosine with any target is 0 in the mean."""
        return {"loss": 2.0}


class Pooled(nn.Module):
    """A backbone as a function of images to its pooled features."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.encode_image(images)


def main(
    run: Run,
    data: Dataset,
    *,
    epochs: Annotated[int, "passes over the training images"] = 20,
    batch_size: Annotated[int, "images a step"] = 32,
    lr: Annotated[float, "peak learning rate of AdamW"] = 1e-3,
    momentum: Annotated[float, "of the teacher at the first step; 1 at the last"] = 0.99,
    embed_dim: Annotated[int, "width of the encoder"] = 64,
    depth: Annotated[int, "transformer blocks"] = 3,
    eval_every: Annotated[int, "epochs between evaluations"] = 5,
) -> None:
    """Train on two asymmetric views, watch the features of validation images without labels, and save the encoder."""
    crop = [RandomResizedCrop(scale=(0.2, 1.0)), HorizontalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale(0.2)]
    views = [View(transform=Compose([*crop, GaussianBlur(p=1.0)])), View(transform=Compose([*crop, GaussianBlur(p=0.1), Solarize(p=0.2)]))]
    batches = data.train.batches(batch_size, shuffle=True, drop_last=True, views=views)
    channels, size, _ = data.shape
    backbone = backbones.build(
        "vitkit:vit", img_size=size, patch_size=size // 8, in_chans=channels, embed_dim=embed_dim, depth=depth, num_heads=2, pool="mean"
    )
    projector, predictor = (heads.build("vitkit:mlp", in_dim=d, out_dim=32, hidden=128, norm="batch") for d in (embed_dim, 32))
    model = BYOL(backbone, projector, predictor, momentum=momentum)
    optimizer = adamw(model, lr=lr)
    schedule = warmup_cosine(optimizer, run.steps(batches, epochs), warmup=run.steps(batches))
    monitors = [evaluators.build(f"vitkit:{name}") for name in ("rankme", "feature_std", "neighbours")]
    evaluate = run.check(data, evaluators.build("vitkit:linear_probe"), *monitors, split="val")
    run.measure_untrained(model, data, *monitors, split="val")
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule):
        if epoch.due(eval_every):
            epoch.evaluate(model, data, *evaluate, split="val")
    run.save(model)
