"""What accuracy to believe of a model's own classifier: its interval, and the accuracy of each class."""

from typing import Any

import torch

from vitkit.contracts import Measurement, Proportions, Scores, SplitName
from vitkit.intervals import wilson
from vitkit.validation import at_least
from vitkit_eval.accuracy import OWN, Accuracy, own_logits
from vitkit_eval.features import check_labels, confusion_matrix, named


class ClassAccuracy:
    """The interval of the accuracy of the model's own `classifier`, and the accuracy of each class.

    - `accuracy_low`, `accuracy_high`: the 95 % interval of the accuracy on images like those of the split (`vitkit.intervals.wilson`).
      It counts the chance of which images were drawn, and nothing else: not another camera, place or time.
    - `mean_class_accuracy`: the mean of the accuracies of the classes that the split has, each with the same weight.
    - `worst_class_accuracy`: the lowest of them.

    The figure `class_accuracy` shows each class with its counts and its interval. Images, ranks and errors are those of the evaluator
    `accuracy`; an image counts as right if its class has the largest logit.
    """

    name = "class_accuracy"

    def __init__(self, *, test_size: int | None = None, seed: int = 0) -> None:
        at_least(1, test_size=test_size)
        self.test_size, self.seed = test_size, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return Accuracy.vitkit_example(samples)

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if an image of this split has no label."""
        check_labels(self.name, dataset, split)

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        logits, labels = own_logits(self.name, model, dataset, split, size=self.test_size, seed=self.seed)
        k, n = len(dataset.classes), len(labels)
        counts = confusion_matrix(labels, logits.argmax(dim=1), k).cpu()
        hits, totals = counts.diagonal(), counts.sum(dim=1)
        low, high = wilson(int(hits.sum()), n)
        present = totals > 0
        by_class = (hits[present] / totals[present]).double()
        values = {
            "accuracy_low": low, "accuracy_high": high,
            "mean_class_accuracy": float(by_class.mean()), "worst_class_accuracy": float(by_class.min()),
        }  # fmt: skip
        interval = f"an end of the 95 % interval (Wilson) of {int(hits.sum()):,} of {n:,}; {OWN}"
        worst = dataset.classes[int(torch.arange(k)[present][by_class.argmin()])]
        notes = {
            "accuracy_low": interval, "accuracy_high": interval,
            "mean_class_accuracy": f"mean over {int(present.sum())} classes; {OWN}", "worst_class_accuracy": f"{worst}; {OWN}",
        }  # fmt: skip
        scores = Scores(
            values,
            protocols={name: Measurement(split, n, chance=1 / k if "class" in name else None, note=notes[name]) for name in values},
            figures={self.name: Proportions(list(dataset.classes), hits.numpy(), totals.numpy())},
        )
        return named(scores, split)


def believable(figure: Proportions, *, chosen_on: int | None = None) -> str:
    """What accuracy to believe, in sentences for a person, from the counts of the test images of each class.

    `chosen_on` is the number of validation images that chose the checkpoint.
    """
    hits, totals = [int(count) for count in figure.hits], [int(count) for count in figure.totals]
    right, count = sum(hits), sum(totals)
    low, high = wilson(right, count)
    sentences = [
        f"{right:,} of {count:,} test images are right ({right / max(count, 1):.1%}). On images like them, believe an accuracy between "
        f"{low:.0%} and {high:.0%} (95 % interval; guessing: {1 / len(totals):.0%})."
    ]
    classes = sorted((hit / total, name, hit, total) for name, hit, total in zip(figure.names, hits, totals, strict=True) if total)
    share, name, hit, total = classes[0]
    if share < right / max(count, 1):
        low, high = wilson(hit, total)
        sentences.append(f"The weakest class is {name}: {hit} of {total} right, between {low:.0%} and {high:.0%}.")
    missing = [name for name, total in zip(figure.names, totals, strict=True) if not total]
    if missing:
        sentences.append(f"Nothing is known of {', '.join(missing[:5])}: there is no test image.")
    if count < FEW_IMAGES:
        sentences.append(f"{count} test images are few: with {FEW_IMAGES} the interval would be at most 14 points wide.")
    if chosen_on is not None:
        sentences.append(f"The checkpoint was chosen on {chosen_on:,} other images, so its accuracy on those is too good to believe.")
    return " ".join(sentences)


FEW_IMAGES = 200
"""With this many images a 95 % interval is at most 14 points wide."""

__all__ = ["ClassAccuracy", "believable"]
