"""A loaded model and its uses: features, predictions, evaluation and export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vitkit.contracts import Scores, SplitName
from vitkit.data.preprocess import Preprocessing, preprocess
from vitkit.errors import UsageError
from vitkit.models.classes import with_class_order
from vitkit.models.export import Export, export
from vitkit.models.features import device_of, encode_image
from vitkit.models.image_sources import prepared
from vitkit.models.predict import Prediction, predict

Images = str | Path | Tensor | Sequence[str | Path | Image.Image]


class Model(nn.Module):
    """A loaded model: its saved modules as attributes, its config, classes and preprocessing.

    `config` is the content of `config.json`, `classes` the class names, `preprocessing` the arguments of `preprocess`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.config = dict(config)
        self.classes: list[str] = list(config["classes"])
        self.preprocessing: dict[str, Any] = dict(config["preprocessing"])

    def preprocess(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """uint8 `(n c h w)` in [0, 255] or Pillow images → float32 `(n c h w)`, resized and normalised as in training.

        Raises `UsageError` for another type or number of channels, and if the model was saved without preprocessing.
        """
        if not self.preprocessing:
            raise UsageError("this model was saved without preprocessing; normalise images as its training did")
        return preprocess(images, Preprocessing.from_json(self.preprocessing))

    def encode_image(self, images: Tensor) -> Tensor:
        """Preprocessed images `(n c h w)` → the backbone's pooled features `(n d)`."""
        backbone = getattr(self, "backbone", None)
        if backbone is None:
            raise UsageError("this model was saved without a module named 'backbone'")
        return encode_image(backbone, images)

    def embed(self, images: Images, *, batch_size: int = 256) -> Tensor:
        """A folder, image files, Pillow images or uint8 `(n c h w)` → features float32 `(n d)` on the CPU.

        Images of a folder and of the folders in it come in alphabetical order. Raises `UsageError` for an image that cannot be
        read, and as `preprocess` does.
        """
        device = device_of(self)
        with torch.no_grad():
            batches = prepared(self, images, batch_size)
            return torch.cat([self.encode_image(batch.to(device)).float().cpu() for batch in batches])

    def predict(
        self, images: Images, *, labels: Sequence[str] | None = None, top: int | None = None, batch_size: int = 256
    ) -> list[Prediction]:
        """A folder, image files, Pillow images or uint8 `(n c h w)` → a `Prediction` each: see `vitkit.models.predict.predict`."""
        device = device_of(self)
        batches = prepared(self, images, batch_size)
        return [prediction for batch in batches for prediction in predict(self, batch.to(device), labels=labels, top=top)]

    def evaluate(self, evaluator: Any, dataset: Any, split: SplitName = "test") -> Scores:
        """An evaluator's scores on a split of a dataset, as this model sees the dataset.

        Its images are preprocessed as the training images were: grey ones are repeated for a model of RGB images, RGB ones become
        luma for a model of grey ones. If its classes have the names of the model's classes in another order, labels follow the
        model's order. Raises `UsageError` as the evaluator does, and for other numbers of channels.
        """
        if self.preprocessing and hasattr(dataset, "with_preprocessing"):
            dataset = dataset.with_preprocessing(Preprocessing.from_json(self.preprocessing))
        if self.classes:
            dataset = with_class_order(dataset, self.classes)
        arguments = () if split == "test" else (split,)
        scores: Scores = evaluator(self, dataset, *arguments)
        return scores

    def export(self, out: str | Path, *, overwrite: bool = False) -> Export:
        """Write `out`, an .onnx or a .pt2 file, checked to give the same numbers: see `vitkit.models.export.export`."""
        return export(self, out, overwrite=overwrite)


__all__ = ["Images", "Model"]
