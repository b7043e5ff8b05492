"""A model's own classifier on the test set."""

from typing import Any

from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.contracts import Scores
from vitkit.errors import UsageError
from vitkit.models import evaluating, extract_features
from vitkit_eval.features import check_labels, classification


class Accuracy:
    """Accuracy of the model's own `classifier`: `accuracy_top1`, with more than ten classes `accuracy_top5` too.

    Nothing is fitted: logits are classifier(encode_image(x)) of every test image, or of `test_size` of them, the classes
    as evenly as they can be had, chosen by `seed`. The dataset's true labels are used. Called under autocast features
    and logits are computed in its precision.

    Ranks: each encodes its share of the images, and every rank returns the same scores.

    Raises `UsageError` for a model without a classifier, for another number of logits than the dataset has classes, and
    as `extract_features`.
    """

    def __init__(self, *, test_size: int | None = None, seed: int = 0) -> None:
        self.test_size, self.seed = test_size, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = backbones.build("vit", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=1)
        model.classifier = heads.build("linear", in_dim=16, out_dim=3)
        return {}, {"model": model}

    def __call__(self, model: Any, dataset: Any) -> Scores:
        classifier, classes = getattr(model, "classifier", None), dataset.classes
        if not isinstance(classifier, nn.Module):
            raise UsageError(
                f"accuracy needs a model with a classifier; {type(model).__name__} has none: use 'linear_probe' or 'knn'"
            )
        split = dataset.test if self.test_size is None else dataset.test.stratified_subset(self.test_size, seed=self.seed)
        test = extract_features(model, split)
        with evaluating(model):
            logits: Tensor = classifier(test.features).float()
        if logits.shape != (len(test.labels), len(classes)):
            raise UsageError(
                f"the classifier gave {tuple(logits.shape)} for {len(test.labels)} images of {len(classes)} classes; "
                f"evaluate it on the dataset it was trained on"
            )
        check_labels(test, classes)
        return classification("accuracy", logits, test, classes, frozen="", note="the model's own classifier")
