"""The evaluators of a multi-task VAE."""

from collections.abc import Callable
from typing import Any

from vitkit import evaluators
from vitkit.registry import Component
from vitkit_eval import usable


def vae_evaluators(
    model: Any,
    data: Any,
    *,
    train_size: int | None = None,
    transfer: Component | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> tuple[list[Any], list[Any]]:
    """The evaluators of a `MultiTaskVAE` for every evaluation, and those for the last one.

    Every evaluation has `knn`, with a classifier `accuracy`, with a decoder `reconstruction`; the last one also has `few_shot`,
    `active_units`, `silhouette`, and `transfer` if its argument `dataset` names one. `train_size` caps the training images
    that evaluators use. An evaluator that cannot measure on `data` is left out, and `say` gets a line that says why.
    """
    every = [evaluators.build("vitkit:knn", train_size=train_size)]
    every += [evaluators.build("vitkit:accuracy")] * (model.classifier is not None)
    every += [evaluators.build("vitkit:reconstruction")] * (model.decoder is not None)
    last = [
        evaluators.build("vitkit:few_shot", train_size=train_size),
        evaluators.build("vitkit:active_units"),
        evaluators.build("vitkit:silhouette", test_size=2000),
    ]
    if transfer is not None and transfer.kwargs.get("dataset"):
        last.append(transfer.build(train_size=train_size))
    every = usable(every, data, say=say)
    return every, [*every, *usable(last, data, say=say)]
