"""The linear probe: multinomial logistic regression on frozen features."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.contracts import Confusion, Measurement, Scores
from vitkit.errors import UsageError
from vitkit_eval.features import confusion_matrix, extract_features, topk_accuracy


class LinearProbe:
    """Accuracy of a linear classifier on frozen features: `linear_top1`.

    Minimises Σᵢ CE(W·xᵢ + b, yᵢ) + ‖W‖²/(2·C) over standardised training features by L-BFGS, scikit-learn's
    `LogisticRegression(C=C)`. `train_size` caps the training images, the classes as evenly as they can be had. The
    dataset's true labels are used, those that training never saw too: it measures the features, not the training.
    Raises `UsageError` for fewer than two classes in training and for features that are not finite.
    """

    def __init__(self, *, C: float = 1.0, max_iter: int = 200, train_size: int | None = None, seed: int = 0) -> None:
        if not C > 0:
            raise UsageError(f"C is {C}; expected a positive inverse strength of regularisation")
        if max_iter < 1:
            raise UsageError(f"max_iter is {max_iter}; expected at least 1")
        self.C, self.max_iter, self.train_size, self.seed = C, max_iter, train_size, seed

    def __call__(self, model: Any, dataset: Any) -> Scores:
        split = dataset.train if self.train_size is None else dataset.train.take(self.train_size, seed=self.seed)
        train, test = extract_features(model, split), extract_features(model, dataset.test)
        k = len(dataset.classes)
        mean, std = train.features.mean(0), train.features.std(0, correction=0).clamp(min=1e-6)
        weight, bias = fit_logistic((train.features - mean) / std, train.labels, k, C=self.C, max_iter=self.max_iter)
        with torch.autocast(weight.device.type, enabled=False):
            logits = (test.features - mean) / std @ weight.T + bias
        return Scores(
            {"linear_top1": topk_accuracy(logits, test.labels)},
            protocols={
                "linear_top1": Measurement(
                    split="test",
                    samples=len(test.labels),
                    chance=1 / k,
                    frozen="encoder",
                    note=f"logistic regression (C={self.C:g}) on {len(train.labels):,} standardised training features",
                )
            },
            pictures={
                "linear_confusion": Confusion(confusion_matrix(test.labels, logits.argmax(1), k).numpy(), dataset.classes)
            },
        )


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, *, C: float = 1.0, max_iter: int = 200
) -> tuple[Tensor, Tensor]:
    """Weights `(k d)` and biases `(k,)` that minimise the mean of CE(W·x + b, y) plus ‖W‖²/(2·C·n).

    Full-batch L-BFGS from zero, in the features' precision; biases are not regularised. Raises `UsageError` where the
    labels hold fewer than two classes.
    """
    if len(labels.unique()) < 2:
        raise UsageError("a linear probe needs training images of at least two classes")
    n, d = features.shape
    weight = features.new_zeros(classes, d, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, history_size=10, tolerance_grad=1e-5, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + weight.square().sum() / (2 * C * n)
        loss.backward()
        return loss

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        optimizer.step(closure)
    return weight.detach(), bias.detach()
