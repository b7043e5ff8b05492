"""A frozen encoder, measured on another dataset than that of the training."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitkit import data
from vitkit.contracts import Scores, SplitName
from vitkit.data import ImageSplit, Preprocessing
from vitkit.errors import UsageError
from vitkit.transforms import grey
from vitkit_eval.features import frozen_features, named, split_of
from vitkit_eval.knn import KNN
from vitkit_eval.linear import LinearProbe


class Transfer:
    """The frozen encoder on another `dataset`: `transfer_knn_top1`, `transfer_linear_top1`, and the same for its pixels.

    The images of the other dataset are converted to the size and channels of the dataset on which the model is evaluated,
    and normalised with its mean and standard deviation (see `adapted`). `knn` (`k` neighbours) and `linear_probe` (`C`)
    then measure the features of the encoder. The same protocol measures the pixels that the encoder gets:
    `pixels_knn_top1`, `pixels_linear_top1`. The scores of pixels do not depend on the model and are measured once. With
    more than ten classes, each metric also has a top-5 form.

    `train_size` and `test_size` limit the numbers of images (chosen by `seed`, in equal shares per class as far as
    possible). `dataset` is built together with the evaluator, so that a missing dataset is an error before the training.

    Ranks: each rank encodes its share of the images, and all ranks return the same scores.

    Errors are those of `vitkit.data.build` (`UnknownNameError`, `DatasetError`) and those of `knn`, `linear_probe` and
    `adapted` (`UsageError`).
    """

    name = "transfer"

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
        self.sizes: dict[str, Any] = {"train_size": train_size, "test_size": test_size, "seed": seed}
        self.probes = (KNN(k=k, **self.sizes), LinearProbe(C=C, **self.sizes))
        self._adapted: tuple[tuple[Preprocessing, SplitName], data.ImageDataset] | None = None
        self._pixels: dict[tuple[Preprocessing, SplitName], Scores] = {}

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"train_size": 60, "test_size": 30}, {}

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if the probes cannot measure on the other dataset's split."""
        for probe in self.probes:
            probe.check(self.dataset, split)

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        self.check(dataset, split)
        key = (Preprocessing(dataset.shape, dataset.mean, dataset.std), split)
        if self._adapted is None or self._adapted[0] != key:  # made once, because its pixels may be a copy
            names: set[SplitName] = {"train", split}
            parts: dict[str, Any] = {name: adapted(split_of(self.dataset, name), key[0]) for name in names}
            self._adapted = (key, replace(self.dataset, **parts))
        other = self._adapted[1]
        if key not in self._pixels:
            self._pixels[key] = self._measure(Pixels(), other, split, "pixels", frozen="nothing learned")
            self._pixels[key].figures.clear()
        return named(self._measure(model, other, split, "transfer", frozen="encoder") | self._pixels[key], split)

    def _measure(self, model: Any, other: data.ImageDataset, split: SplitName, prefix: str, *, frozen: str) -> Scores:
        train, test = frozen_features(model, other, split, **self.sizes)
        scores = Scores()
        for probe in self.probes:
            scores |= probe.score(train, test, other.classes, split=split)
        for name, protocol in scores.protocols.items():
            scores.protocols[name] = replace(protocol, frozen=frozen, note=f"on {other.name}: {protocol.note}")
        return scores.prefixed(f"{prefix}_")


class Pixels:
    """A model whose features are the pixels of its input: `(b c h w)` → `(b c·h·w)`."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def adapted(split: ImageSplit, preprocessing: Preprocessing) -> ImageSplit:
    """A split with batches for a model that was trained on images prepared by `preprocessing`.

    Images are padded or resized to the size of `preprocessing`, by the `fit` of their dataset, and normalised with the mean
    and std of `preprocessing`. For a model with three channels, grey images are repeated. For a model with one channel,
    colours become luma (ITU-R BT.601), as a copy in memory. Raises `UsageError` for other differences between the numbers
    of channels.
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
