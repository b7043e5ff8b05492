"""What a run of the multi-task VAE is measured by."""

from typing import Any, Literal

from vitkit import evaluators
from vitkit.contracts import Scores
from vitkit.models import feature_cache
from vitkit_eval import adapted
from vitkit_vae.transfer import PatchFeatures


class Evaluation:
    """The evaluators of a `MultiTaskVAE`: `(model, data, last=...)` → their scores, features extracted once for all.

    Each time `knn`, with a classifier `accuracy`, with a decoder `reconstruction`; at the `last` also `few_shot`,
    `active_units`, `silhouette`, and `transfer` to the dataset `transfer_to` if any, by `PatchFeatures` or by the embedding.
    `train_size` caps the training images that are looked at. Built before training, so that a name or dataset that is not
    there is said then.
    """

    def __init__(
        self,
        *,
        train_size: int | None = None,
        transfer_to: str | None = None,
        transfer_features: Literal["patches", "embedding"] = "patches",
    ) -> None:
        self.knn = evaluators.build("vitkit:knn", train_size=train_size)
        self.accuracy, self.reconstruction = evaluators.build("vitkit:accuracy"), evaluators.build("vitkit:reconstruction")
        self.at_last = [
            evaluators.build("vitkit:few_shot", train_size=train_size),
            evaluators.build("vitkit:active_units"),
            evaluators.build("vitkit:silhouette", test_size=2000),
        ]
        self.transfer = evaluators.build("vitkit:transfer", dataset=transfer_to, train_size=train_size) if transfer_to else None
        self.patches = transfer_features == "patches"

    def __call__(self, model: Any, data: Any, *, last: bool) -> list[Scores]:
        chosen = [self.knn]
        chosen += [self.accuracy] * (model.classifier is not None)
        chosen += [self.reconstruction] * (model.decoder is not None)
        if last:
            chosen += self.at_last
        with feature_cache():
            scores = [evaluator(model, data) for evaluator in chosen]
            if last and self.transfer is not None:
                shown = model
                if self.patches:
                    shown = PatchFeatures(model.backbone, adapted(self.transfer.dataset.train, data.train.preprocessing))
                scores.append(self.transfer(shown, data))
        return scores
