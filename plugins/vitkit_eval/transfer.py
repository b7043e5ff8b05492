"""What an encoder is worth on images of another kind than it was trained on."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitkit import data
from vitkit.contracts import Scores
from vitkit.data import ImageSplit, Preprocessing
from vitkit.errors import UsageError
from vitkit.transforms import grey
from vitkit_eval.features import frozen_features
from vitkit_eval.knn import KNN
from vitkit_eval.linear import LinearProbe


class Transfer:
    """The frozen encoder on another `dataset`: `transfer_knn_top1`, `transfer_linear_top1`, and the pixels beside it.

    The other dataset's images are brought to the size and channels of the dataset that the model is evaluated on and
    normalised with its mean and standard deviation, as `adapted` says. `knn` (`k` neighbours) and `linear_probe` (`C`)
    then work on the encoder's features of its training and test split, and by the same protocol on the very pixels that
    the encoder is shown: `pixels_knn_top1`, `pixels_linear_top1`. Those are the same in each evaluation and are measured
    in the first. With more than ten classes each has its top-5 too.

    `train_size` and `test_size` cap the images, the classes as evenly as they can be had, chosen by `seed`.
    `dataset` is looked up when this is built, so that a missing one is noticed before training.

    Ranks: each encodes its share of the images, and every rank returns the same scores.

    Raises `UnknownNameError` and `DatasetError` as `vitkit.data.dataset.build` does, and `UsageError` as `knn`, `linear_probe`
    and `adapted` do.
    """

    def __init__(
        self,
        *,
        dataset: str = "digits",
        k: int = 20,
        C: float = 1.0,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset = data.build(dataset)
        self.probes = (KNN(k=k), LinearProbe(C=C))
        self.train_size, self.test_size, self.seed = train_size, test_size, seed
        self._prepared: tuple[Preprocessing, data.ImageDataset] | None = None
        self._pixels: Scores | None = None

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"train_size": 60, "test_size": 30}, {}

    def __call__(self, model: Any, dataset: Any) -> Scores:
        other = self._adapted(Preprocessing(dataset.shape, dataset.mean, dataset.std))
        if self._pixels is None:
            self._pixels = self._measure(Pixels(), other, "pixels", frozen="nothing learned")
        found = self._measure(model, other, "transfer", frozen="encoder")
        return Scores(
            {**found, **self._pixels},
            protocols=found.protocols | self._pixels.protocols,
            figures=found.figures,
        )

    def _adapted(self, preprocessing: Preprocessing) -> data.ImageDataset:
        """The other dataset as the model takes it, capped; made once, for its pixels may be a copy."""
        if self._prepared is None or self._prepared[0] != preprocessing:
            train, test = (
                adapted(split if size is None else split.stratified_subset(size, seed=self.seed), preprocessing)
                for split, size in ((self.dataset.train, self.train_size), (self.dataset.test, self.test_size))
            )
            self._prepared, self._pixels = (preprocessing, replace(self.dataset, train=train, test=test)), None
        return self._prepared[1]

    def _measure(self, model: Any, other: data.ImageDataset, prefix: str, *, frozen: str) -> Scores:
        train, test = frozen_features(model, other)
        scores = Scores()
        for probe in self.probes:
            found = probe.score(train, test, other.classes)
            for name, value in found.items():
                protocol = found.protocols[name]
                note = f"on {other.name}: {protocol.note}"
                scores[f"{prefix}_{name}"] = value
                scores.protocols[f"{prefix}_{name}"] = replace(protocol, frozen=frozen, note=note)
            scores.figures |= {f"{prefix}_{name}": picture for name, picture in found.figures.items()}
        return scores


class Pixels:
    """A model whose features are the pixels that it is shown: `(b c h w)` → `(b c·h·w)`."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def adapted(split: ImageSplit, preprocessing: Preprocessing) -> ImageSplit:
    """A split whose batches a model takes that was trained on images prepared by `preprocessing`.

    Images are padded or resized as their own dataset has it (`fit`), to the size of `preprocessing`, and normalised with its
    mean and std. Grey ones are repeated for a model of three channels; coloured ones become luma (ITU-R BT.601) for a
    model of one, a copy in memory. Raises `UsageError` for other numbers of channels that differ.
    """
    given, wanted = split.images.shape[1], preprocessing.shape[0]
    preprocessing = replace(preprocessing, fit=split.preprocessing.fit)
    if given == wanted:
        return replace(split, preprocessing=preprocessing)
    split = split.in_memory()
    if (given, wanted) == (1, 3):
        return replace(split, images=split.images.expand(-1, 3, -1, -1), preprocessing=preprocessing)
    if (given, wanted) == (3, 1):
        luma = torch.cat([grey(chunk.float()).round_().byte() for chunk in split.images.split(4096)])
        return replace(split, images=luma, preprocessing=preprocessing)
    raise UsageError(f"images have {given} channels, the model takes {wanted}; only grey and RGB are turned into another")
