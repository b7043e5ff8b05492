"""A model's own classifier on a split."""

from typing import Any

from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.contracts import Scores, SplitName
from vitkit.errors import UsageError
from vitkit.models import evaluating, extract_features
from vitkit.validation import at_least
from vitkit_eval.features import check_labels, classification, model_classes, named, split_of

OWN = "the model's own classifier"


class Accuracy:
    """Accuracy of the model's own `classifier`: `accuracy_top1`, and with more than ten classes `accuracy_top5`.

    Nothing is fitted: logits are classifier(encode_image(x)) of every image of the split. `test_size` limits the number of
    images (chosen by `seed`, in equal shares per class as far as possible). Equal logits share their places (see
    `vitkit_eval.ties`). If the model has names of classes, they are matched with the dataset's by name. Under autocast
    features and logits are computed in the precision of autocast.

    Ranks: each rank encodes its share of the images, and all ranks return the same scores.

    Raises `UsageError` if the model has no classifier or other classes than the dataset, or if an image has no label. Other
    errors are those of `extract_features`.
    """

    name = "accuracy"

    def __init__(self, *, test_size: int | None = None, seed: int = 0) -> None:
        at_least(1, test_size=test_size)
        self.test_size, self.seed = test_size, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = backbones.build("vitkit:vit", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=1)
        model.classifier = heads.build("vitkit:linear", in_dim=16, out_dim=3)
        return {}, {"model": model}

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if an image of this split has no label."""
        check_labels(self.name, dataset, split)

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        logits, labels = own_logits(self.name, model, dataset, split, size=self.test_size, seed=self.seed)
        scores = classification(self.name, logits, labels, dataset.classes, split=split, frozen="", note=OWN)
        return named(scores, split)


def own_logits(
    name: str, model: Any, dataset: Any, split: SplitName, *, size: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The logits `(n k)` of a model's own `classifier`, in the order of the dataset's classes, and the labels `(n,)`.

    For the evaluator `name`, which messages name. Images, errors and ranks are those of `Accuracy`.
    """
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Module):
        raise UsageError(f"{name} needs a model with a classifier; {type(model).__name__} has none: use 'linear_probe' or 'knn'")
    check_labels(name, dataset, split)
    columns = model_classes(model, dataset)
    features = extract_features(model, split_of(dataset, split), size=size, seed=seed)
    with evaluating(model):
        logits: Tensor = classifier(features.features).float()
    if logits.shape != (len(features.labels), len(dataset.classes)):
        raise UsageError(
            f"the classifier gave {tuple(logits.shape)} for {len(features.labels)} images of {len(dataset.classes)} classes; "
            f"evaluate it on the dataset it was trained on"
        )
    return logits[:, columns], features.labels
