"""The evaluators of a multi-task VAE."""

from typing import Any

from vitkit import evaluators
from vitkit.registry import Component


def vae_evaluators(
    model: Any, *, train_size: int | None = None, transfer: Component | None = None
) -> tuple[list[Any], list[Any]]:
    """The evaluators of a `MultiTaskVAE` for every evaluation, and further ones for the last.

    Every evaluation has `knn`, with a classifier `accuracy`, with a decoder `reconstruction`; the last one also has `few_shot`,
    `active_units`, `silhouette`, and `transfer` if its argument `dataset` names one. `train_size` caps the training images
    that evaluators use.
    """
    every = [evaluators.build("vitkit:knn", train_size=train_size)]
    every += [evaluators.build("vitkit:accuracy")] * (model.classifier is not None)
    every += [evaluators.build("vitkit:reconstruction")] * (model.decoder is not None)
    at_last = [
        evaluators.build("vitkit:few_shot", train_size=train_size),
        evaluators.build("vitkit:active_units"),
        evaluators.build("vitkit:silhouette", test_size=2000),
    ]
    if transfer is not None and transfer.kwargs.get("dataset"):
        at_last.append(transfer.build(train_size=train_size))
    return every, at_last
