"""What is measured of a network that learns without labels, beside the untrained network and raw pixels."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitkit import Run, evaluators
from vitkit.contracts import Evaluator, Scores
from vitkit.models import feature_cache

LIDAR_IMAGES, LIDAR_VIEWS = 300, 5


class RawPixels:
    """A model whose features are the pixels of its input: `(b c h w)` → `(b c·h·w)`."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@dataclass(frozen=True)
class Monitors:
    """Evaluators of frozen features.

    - `watched` measure on the validation split as the training goes: kNN and linear probe (of `size` training and validation images, None:
      all), RankMe, α-ReQ and LiDAR. Without labels the standard deviation of the features and a sheet of nearest images take the place of
      kNN and linear probe.
    - `final` measure kNN and linear probe on all test images, for the record; their training images are all, or `train_size`.
    - With `probe_dataset` both also measure on another dataset (the evaluator `transfer`).
    """

    run: Run
    data: Any
    watched: list[Evaluator]
    final: list[Evaluator]

    @classmethod
    def of(
        cls, run: Run, data: Any, *, size: int | None = None, train_size: int | None = None, probe_dataset: str | None = None
    ) -> "Monitors":
        """The monitors that suit `data`; a line reports each that is left out."""
        sizes = {"train_size": size, "test_size": size}
        transfer = [evaluators.build("vitkit:transfer", dataset=probe_dataset, **sizes)] if probe_dataset else []
        names = ("rankme", "alpha_req") if data.classes else ("rankme", "alpha_req", "feature_std", "neighbours")
        watched = run.check(
            data,
            *(evaluators.build(f"vitkit:{name}", **sizes) for name in ("knn", "linear_probe") if data.classes),
            *transfer,
            *(evaluators.build(f"vitkit:{name}") for name in names),
            evaluators.build("vitkit:lidar", images=LIDAR_IMAGES, views=LIDAR_VIEWS),
            split="val",
        )
        probes = (evaluators.build(f"vitkit:{name}", train_size=train_size) for name in ("knn", "linear_probe") if data.classes)
        final = run.check(data, *probes, *transfer)
        return cls(run, data, watched, final)

    def measure_untrained(self, model: nn.Module) -> None:
        """Before `run.fit`: the untrained network's values, and kNN of raw pixels as a line in the report."""
        self.run.measure_untrained(model, self.data, *self.watched, split="val")
        scores = raw_pixel_scores(self.data, *(e for e in self.watched if getattr(e, "name", "") == "knn"), split="val")
        if scores:
            self.run.reference("raw pixels", **scores)

    def after(self, epoch: Any, model: nn.Module, every: int) -> None:
        """Evaluate on the validation split every `every` epochs, and after the last one on the test split too."""
        if epoch.due(every):
            epoch.evaluate(model, self.data, *self.watched, split="val")
        if epoch.number == epoch.epochs:
            epoch.evaluate(model, self.data, *self.final)


def raw_pixel_scores(data: Any, *probes: Evaluator, split: Any = "test") -> Scores:
    """The scores of raw pixels; the probes share the pixels."""
    scores = Scores()
    with feature_cache():
        for probe in probes:
            scores |= probe(RawPixels(), data, split=split)
    return scores


__all__ = ["Monitors", "RawPixels", "raw_pixel_scores"]
