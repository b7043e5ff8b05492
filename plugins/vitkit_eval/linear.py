"""The linear probe: multinomial logistic regression on frozen features."""


import torch
from torch import Tensor

from vitkit.contracts import Scores
from vitkit.errors import UsageError
from vitkit.models import Features
from vitkit_eval.features import FrozenProbe, check_classes, classification


class LinearProbe(FrozenProbe):
    """Accuracy of a linear classifier on frozen features: `linear_top1`, with more than ten classes `linear_top5` too.

    Minimises Σᵢ CE(W·xᵢ + b, yᵢ) + ‖W‖²/(2·C) over standardised training features by L-BFGS, as scikit-learn's
    `LogisticRegression(C=C)` does. C = 1, its default, weighs ‖W‖² like one sample: next to nothing for the tens of
    thousands of images here, enough to keep W finite where few of them can be told apart without an error.

    `train_size` and `test_size` cap the images, the classes as evenly as they can be had, chosen by `seed`. The
    dataset's true labels are used, also those that training never saw: it measures the features, not the training.
    Called under autocast the features are computed in its precision, everything else in fp32.

    Ranks: each encodes its share of the images, and every rank returns the same scores.

    Raises `UsageError` for fewer than two classes in training, and as `extract_features` does.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        max_iter: int = 200,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not C > 0:
            raise UsageError(f"C is {C}; expected a positive inverse strength of regularisation")
        if max_iter < 1:
            raise UsageError(f"max_iter is {max_iter}; expected at least 1")
        self.C, self.max_iter = C, max_iter
        super().__init__(train_size=train_size, test_size=test_size, seed=seed)

    def score(self, train: Features, test: Features, classes: list[str]) -> Scores:
        check_classes(train, test, classes)
        mean, scale = moments(train.features)
        with torch.autocast(train.features.device.type, enabled=False):
            weight, bias = fit_logistic(
                (train.features - mean) / scale, train.labels, len(classes), C=self.C, max_iter=self.max_iter
            )
            logits = (test.features - mean) / scale @ weight.T + bias
        note = f"logistic regression (C={self.C:g}) on {len(train.labels):,} standardised training features"
        return classification("linear", logits, test, classes, note=note)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(d,)` of features `(n d)`; 1 for a feature that is constant but for rounding."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    rounding = 10 * torch.finfo(features.dtype).eps * features.abs().amax(dim=0)
    return mean, std.where(std > rounding, torch.ones_like(std))


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, *, C: float = 1.0, max_iter: int = 200
) -> tuple[Tensor, Tensor]:
    """Weights `(k d)` and biases `(k,)` that minimise the mean of CE(W·x + b, y) plus ‖W‖²/(2·C·n).

    Full-batch L-BFGS from zero in the features' precision, until no entry of the gradient exceeds 1e-5 or for `max_iter`
    iterations; biases are not regularised. Labels are in [0, classes).
    """
    n, d = features.shape
    weight, bias = features.new_zeros(classes, d), features.new_zeros(classes, 1)
    columns, own = features.T.contiguous(), labels[None]  # (d n): products with few classes are faster this way round
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        # The gradient is written out, (softmax − one-hot)·xᵀ/n, in half the time that autograd takes.
        log_probability = torch.addmm(bias, weight, columns).log_softmax(dim=0)  # (k n)
        loss = weight.square().sum() / (2 * C * n) - log_probability.gather(0, own).mean()
        residual = log_probability.exp_().scatter_add_(0, own, log_probability.new_full((1, n), -1.0))
        weight.grad = residual @ features / n + weight / (C * n)
        bias.grad = residual.mean(dim=1, keepdim=True)
        return loss

    optimizer.step(closure)
    return weight, bias[:, 0]
