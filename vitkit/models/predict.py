"""Predictions of a saved model: the class of an image, or the label nearest to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.contracts import TrainedModel
from vitkit.errors import UsageError
from vitkit.validation import at_least

Measure = Literal["probability", "cosine"]


@dataclass(frozen=True)
class Prediction:
    """The labels of an image, the best one first, with a score each: a probability, or a cosine in [−1, 1]."""

    labels: list[str]
    scores: list[float]
    measure: Measure

    @property
    def label(self) -> str:
        """The label with the highest score."""
        return self.labels[0]


def predict(
    model: TrainedModel, images: Tensor, *, labels: Sequence[str] | None = None, top: int | None = None
) -> list[Prediction]:
    """A `Prediction` for each of the preprocessed images `(n c h w)`, with the `top` best labels, or all.

    The scores come from the first of these parts that the model has:

    - `classifier`: probabilities, the softmax of its logits;
    - `text`: cosines between images and texts, the model's classes or `labels`;
    - `backbone.encode_label`: cosines between images and classes.

    Cosines are those of projections by `projector` and `text_projector`, or of plain features without them. Raises `UsageError` for a
    model that has none of them.
    """
    names, measure, score = _scoring(model, labels)
    at_least(1, top=top)
    with torch.inference_mode():
        values, order = score(model.encode_image(images)).float().cpu().sort(dim=1, descending=True, stable=True)
    count = len(names) if top is None else min(top, len(names))
    return [
        Prediction([names[label] for label in best[:count]], scores[:count], measure)
        for scores, best in zip(values.tolist(), order.tolist(), strict=True)
    ]


Scoring = Callable[[Tensor], Tensor]


def _scoring(model: TrainedModel, labels: Sequence[str] | None) -> tuple[list[str], Measure, Scoring]:
    """The names of the labels, the kind of score, and a function from features `(n d)` → scores `(n k)`."""
    classifier: Any = getattr(model, "classifier", None)
    backbone: Any = getattr(model, "backbone", None)
    text: Any = getattr(model, "text", None)
    project: Any = getattr(model, "projector", nn.Identity())
    project_text: Any = getattr(model, "text_projector", nn.Identity())
    if classifier is not None and labels is None:
        return model.classes, "probability", lambda features: _probabilities(model, classifier(features))
    if hasattr(text, "encode_text"):
        texts = list(labels) if labels is not None else model.classes
        if not texts:
            raise UsageError("this model compares images with texts: give it some, with --label 'a text' or labels=[...]")
        return texts, "cosine", lambda features: _cosines(project(features), project_text(text.encode_text(texts)))
    if labels is not None:
        raise UsageError(f"only a model with a module named 'text' takes --label or labels=[...]; {_has(model)}")
    if hasattr(backbone, "encode_label"):
        device = next(backbone.parameters()).device
        classes = torch.arange(len(model.classes), device=device)
        return model.classes, "cosine", lambda features: _cosines(
            project(features), project(backbone.encode_label(classes))
        )
    raise UsageError(
        f"predicting needs a module named 'classifier' or 'text', or a backbone that encodes labels; {_has(model)}: "
        f"`vitkit embed` gives its features, `vitkit eval` measures them; a recipe saves a classifier with "
        f"run.save(backbone=..., classifier=...)"
    )


def _has(model: TrainedModel) -> str:
    parts = [f"{name} ({spec['name']})" for name, spec in model.config["modules"].items()]
    return f"this model has {', '.join(parts) or 'no module'}"


def _probabilities(model: TrainedModel, logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] != len(model.classes):
        raise UsageError(
            f"the classifier gives {tuple(logits.shape)}, but the model was saved with {len(model.classes)} classes; "
            f"expected ({len(logits)}, {len(model.classes)})"
        )
    return logits.float().softmax(dim=1)


def _cosines(images: Tensor, labels: Tensor) -> Tensor:
    return F.normalize(images.float(), dim=1) @ F.normalize(labels.float(), dim=1).T


__all__ = ["Prediction", "predict"]
