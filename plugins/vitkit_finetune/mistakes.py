"""The mistakes that a classifier is surest of, for a report: the images, and where the backbone attends in them."""

from typing import Any

import torch
from torch import Tensor

from vitkit.contracts import Attention, ReportFigure, Sheet, SplitName
from vitkit.errors import UsageError
from vitkit.models import attention, encode_image, evaluating

BATCH = 256
EVEN = 3.0
"""Attention to a patch is bright from this many times the mean on."""


def mistake_figures(model: Any, data: Any, split: SplitName = "test", *, count: int = 16) -> dict[str, ReportFigure]:
    """Figures of the `count` mistakes with the highest probabilities; empty if the classifier makes no mistake.

    `surest_mistakes` is a sheet of the images, each with its class, the class it was taken for, and the probability. Where the backbone
    attends from all tokens to all in its last block, `attention_over_mistakes` shows the mean of its heads: the attention of the CLS token
    to each patch, or of all patches to each patch. Each map is divided by its highest value, or by three times its mean where no value is
    that high: even attention stays dark.
    """
    images, labels = getattr(data, split), []
    sure: list[Tensor] = []
    taken: list[Tensor] = []
    with evaluating(model) as device:
        for batch in images.batches(BATCH).epoch(0, device=device):
            probabilities = model.classifier(encode_image(model, batch["images"])).float().softmax(dim=1)
            values, guesses = probabilities.max(dim=1)
            sure.append(values.cpu())
            taken.append(guesses.cpu())
            labels.append(batch["labels"].cpu())
    values, guesses, truth = torch.cat(sure), torch.cat(taken), torch.cat(labels)
    wrong = (guesses != truth).nonzero().squeeze(1)
    if len(truth) != len(images) or not len(wrong):  # images that cannot be read have no row of their own
        return {}
    chosen = wrong[values[wrong].argsort(descending=True, stable=True)[:count]]
    few = images.subset(chosen).in_memory()
    pixels = few.preprocessing.pixels(few.images)
    captions = [
        f"{data.classes[int(truth[row])]}\ntaken for {data.classes[int(guesses[row])]}\n{float(values[row]):.0%} sure"
        for row in chosen.tolist()
    ]
    figures: dict[str, ReportFigure] = {"surest_mistakes": Sheet(pixels.numpy(), captions)}
    try:
        maps = attention(model.backbone, few.preprocessing.normalise(pixels.clone()).to(device)).head_maps().mean(dim=1)
    except UsageError:  # no attention between all tokens
        return figures
    brightest = torch.maximum(maps.amax(dim=(1, 2)), EVEN * maps.mean(dim=(1, 2)))
    maps = maps / brightest.clamp(min=1e-12)[:, None, None]
    names = [f"{data.classes[int(truth[row])]} → {data.classes[int(guesses[row])]}" for row in chosen.tolist()]
    figures["attention_over_mistakes"] = Attention(pixels.numpy(), maps.cpu().numpy(), names)
    return figures


__all__ = ["mistake_figures"]
