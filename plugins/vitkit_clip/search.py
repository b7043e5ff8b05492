"""Images nearest to a caption, and captions and images nearest to an image, by a saved model of pairs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vitkit.contracts import Sheet
from vitkit.data import Preprocessing, preprocess
from vitkit.errors import UsageError
from vitkit.models import evaluating, images_below, open_image
from vitkit_clip.pairs import Pairs, captions
from vitkit_clip.retrieval import check_embeddings, check_towers, embed_images, embed_texts
from vitkit_eval import nearest_items

BATCH_SIZE = 250
PAIR_WIDTH = 0.75
"""An image whose width-to-height ratio is at least this share of a pair's ratio counts as a pair."""


def as_pair(image: Image.Image, half: Preprocessing) -> Tensor:
    """An image of any mode → a normalised pair `(1 c h 2w)`.

    An image that is about as wide as a pair is a pair. Any other image is placed on both halves.
    """
    channels, height, width = half.shape
    if image.width * height >= PAIR_WIDTH * 2 * width * image.height:
        return preprocess([image], replace(half, shape=(channels, height, 2 * width)))
    one = preprocess([image], half)
    return torch.cat([one, one], dim=-1)


class Gallery(Protocol):
    """The images to search: batches as the model takes them, and single images for display."""

    def batches(self) -> Iterator[Tensor]: ...

    def show(self, numbers: list[int]) -> tuple[Tensor, list[str]]:
        """Images `(n c h 2w)` in [0, 1] and their names."""
        ...


@dataclass(frozen=True)
class PairGallery:
    """Fixed pairs of a dataset's images."""

    pairs: Pairs

    def batches(self) -> Iterator[Tensor]:
        for batch in self.pairs.epoch(0):
            yield batch["images"]

    def show(self, numbers: list[int]) -> tuple[Tensor, list[str]]:
        split, classes = self.pairs.split, self.pairs.classes
        sides = [side[numbers] for side in self.pairs.drawn()]
        halves = [split.preprocessing.pixels(split.images.index_select(0, side)) for side in sides]
        named = zip(*(split.labels[side].tolist() for side in sides), strict=True)
        return torch.cat(halves, dim=-1), [f"{classes[left]} | {classes[right]}" for left, right in named]


@dataclass
class FolderGallery:
    """The images of a folder and its subfolders, each prepared by `prepare`, by default as a pair; `skipped` names the unreadable ones."""

    folder: Path
    preprocessing: Preprocessing
    most: int
    prepare: Callable[[Image.Image, Preprocessing], Tensor] = as_pair
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UsageError(f"there is no folder {self.folder}; give one that holds images")
        self.paths: list[Path] = []
        self._candidates = images_below(self.folder)[: self.most]

    def batches(self) -> Iterator[Tensor]:
        self.paths.clear()
        self.skipped.clear()
        read: list[Tensor] = []
        for path in self._candidates:
            try:
                read.append(self.prepare(open_image(path), self.preprocessing))
            except UsageError as error:
                self.skipped.append(str(error))
                continue
            self.paths.append(path)
            if len(read) == BATCH_SIZE:
                yield torch.cat(read)
                read = []
        if read:
            yield torch.cat(read)
        if not self.paths:
            raise UsageError(f"{self.folder} holds no readable image; {self.skipped[0]}")

    def show(self, numbers: list[int]) -> tuple[Tensor, list[str]]:
        paths = [self.paths[number] for number in numbers]
        pairs = torch.cat([self.prepare(open_image(path), self.preprocessing) for path in paths])
        return denormalised(pairs, self.preprocessing), [str(path.relative_to(self.folder)) for path in paths]


@dataclass(frozen=True)
class Nearest:
    """The nearest items, best first: their names and their cosines in [−1, 1]."""

    names: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Answer:
    """The images nearest to a caption or an image, a sheet of them, and for an image also the nearest captions.

    `unknown`: words of the caption that are not in the text tower's vocabulary.
    """

    images: Nearest
    sheet: Sheet
    captions: Nearest | None = None
    unknown: tuple[str, ...] = ()


def denormalised(pairs: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised `(n c h w)` → [0, 1]."""
    mean, std = (torch.tensor(moments)[:, None, None] for moments in (preprocessing.mean, preprocessing.std))
    return (pairs.cpu() * std + mean).clamp(0, 1)


def find_by_caption(model: Any, caption: str, gallery: Gallery, count: int) -> Answer:
    """The `count` images of a gallery that are nearest to a caption; errors as the model's text tower raises them."""
    check_towers(model)
    unknown = getattr(model.text, "unknown_words", None)
    with evaluating(model):
        nearest, images = _nearest(model, embed_texts(model, [caption]), gallery, count)
    sheet = Sheet(images.numpy(), _labels(nearest), columns=5)
    return Answer(nearest, sheet, unknown=tuple(dict.fromkeys(unknown(caption))) if unknown else ())


def find_by_image(model: Any, pair: Tensor, gallery: Gallery, count: int, half: Preprocessing) -> Answer:
    """The captions of the model's classes and the images of a gallery that are nearest to a pair `(1 c h 2w)`."""
    all_captions = captions(model.classes)
    with evaluating(model) as device:
        query = embed_images(model, pair.to(device))
        texts = embed_texts(model, all_captions)
        check_embeddings(query, texts)
        scores, numbers = nearest_items(query, texts, count)
        k, best = len(model.classes), int(numbers[0, 0])
        nearest_captions = Nearest([all_captions[number] for number in numbers[0].tolist()], scores[0].tolist())
        nearest, images = _nearest(model, query, gallery, count)
    images = torch.cat([denormalised(pair, half), images])
    given = f"given: {model.classes[best // k]} | {model.classes[best % k]}"
    return Answer(nearest, Sheet(images.numpy(), [given, *_labels(nearest)], columns=5), captions=nearest_captions)


def _nearest(model: Any, query: Tensor, gallery: Gallery, count: int) -> tuple[Nearest, Tensor]:
    embeddings = torch.cat([embed_images(model, images.to(query.device)) for images in gallery.batches()])
    check_embeddings(embeddings, query)
    scores, numbers = nearest_items(query, embeddings, count)
    images, names = gallery.show(numbers[0].tolist())
    return Nearest(names, scores[0].tolist()), images


def _labels(nearest: Nearest) -> list[str]:
    return [f"{score:.3f} {name}" for name, score in zip(nearest.names, nearest.scores, strict=True)]
