"""Images of a folder or dataset that are nearest to one image, by the features of any saved encoder of single images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitkit.contracts import UNLABELLED, Sheet
from vitkit.data import ImageDataset, Preprocessing, preprocess
from vitkit.errors import UsageError
from vitkit.models import encode_image, evaluating
from vitkit_clip.retrieval import check_embeddings
from vitkit_clip.search import BATCH_SIZE, Answer, FolderGallery, Gallery, Nearest, denormalised
from vitkit_eval import nearest_items


@dataclass(frozen=True)
class SplitGallery:
    """The first `most` test images of a dataset, as a model takes them."""

    data: ImageDataset
    most: int

    def batches(self) -> Iterator[Tensor]:
        few = self.data.test.subset(torch.arange(min(self.most, len(self.data.test))))
        for batch in few.batches(BATCH_SIZE).epoch(0):
            yield batch["images"]

    def show(self, numbers: list[int]) -> tuple[Tensor, list[str]]:
        chosen = self.data.test.subset(torch.tensor(numbers)).in_memory()
        names = (self.data.classes[label] if label != UNLABELLED else "image" for label in chosen.labels.tolist())
        return chosen.preprocessing.pixels(chosen.images), [f"{name} #{number}" for name, number in zip(names, numbers, strict=True)]


def preprocessing_of(model: Any) -> Preprocessing:
    """The preprocessing of a saved encoder of single images; `UsageError` for a model without it, or without a backbone."""
    if getattr(model, "backbone", None) is None or not model.preprocessing:
        missing = "preprocessing" if getattr(model, "backbone", None) is not None else "a module named 'backbone'"
        raise UsageError(
            f"searching for an image needs a model with a backbone and its preprocessing; this one was saved without {missing}"
        )
    return Preprocessing.from_json(model.preprocessing)


def as_single(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """An image of any mode and size → a normalised `(1 c h w)`."""
    return preprocess([image], preprocessing)


def similar_images(folder: Path, preprocessing: Preprocessing, most: int) -> FolderGallery:
    """The gallery of the images of a folder and its subfolders, `most` at most."""
    return FolderGallery(folder, preprocessing, most, as_single)


def find_similar(model: Any, image: Tensor, gallery: Gallery, count: int, preprocessing: Preprocessing) -> Answer:
    """The `count` images of a gallery whose features have the highest cosines with those of an image `(1 c h w)`.

    The image itself stands first in the sheet. Raises `VitkitError` for features that are not finite.
    """
    with evaluating(model) as device:
        query = encode_image(model, image.to(device)).float()
        features = torch.cat([encode_image(model, batch.to(device)).float() for batch in gallery.batches()])
        check_embeddings(features, query)
        scores, numbers = nearest_items(query, features, count)
        images, names = gallery.show(numbers[0].tolist())
    nearest = Nearest(names, scores[0].tolist())
    captions = ["searched for", *(f"{score:.3f} {name}" for score, name in zip(nearest.scores, names, strict=True))]
    return Answer(nearest, Sheet(torch.cat([denormalised(image, preprocessing), images.cpu()]).numpy(), captions, columns=6))


__all__ = ["SplitGallery", "as_single", "find_similar", "preprocessing_of", "similar_images"]
