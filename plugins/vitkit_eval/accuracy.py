"""A model's own classifier on a split."""

from typing import Any

from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.contracts import Scores, SplitName
from vitkit.errors import UsageError
from vitkit.models import evaluating, extract_features
from vitkit.validation import at_least
from vitkit_eval.features import check_labels, classification, model_classes, named, split_of


class Accuracy:
    """Accuracy of the model's own `classifier`: `accuracy_top1`, with more than ten classes `accuracy_top5` too.

    Nothing is fitted: logits are classifier(encode_image(x)) of every image of the split, or of `test_size` of them, the
    classes in equal shares as far as possible, chosen by `seed`. Equal logits share their places. Classes of a model that
    names them are matched with the dataset's by name. Under autocast features and logits are computed in its precision.

    Ranks: each encodes its share of the images, and every rank returns the same scores.

    Raises `UsageError` for a model without a classifier, for other classes than the dataset's, for images without a label,
    and as `extract_features` does.
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
        classifier, classes = getattr(model, "classifier", None), dataset.classes
        if not isinstance(classifier, nn.Module):
            raise UsageError(
                f"accuracy needs a model with a classifier; {type(model).__name__} has none: use 'linear_probe' or 'knn'"
            )
        self.check(dataset, split)
        columns = model_classes(model, dataset)
        features = extract_features(model, split_of(dataset, split), size=self.test_size, seed=self.seed)
        with evaluating(model):
            logits: Tensor = classifier(features.features).float()
        if logits.shape != (len(features.labels), len(classes)):
            raise UsageError(
                f"the classifier gave {tuple(logits.shape)} for {len(features.labels)} images of {len(classes)} classes; "
                f"evaluate it on the dataset it was trained on"
            )
        note = "the model's own classifier"
        scores = classification(self.name, logits[:, columns], features.labels, classes, split=split, frozen="", note=note)
        return named(scores, split)
