"""Pictures nearest to a caption, and captions and pictures nearest to a picture, by a saved model of pairs."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vitkit.contracts import Sheet
from vitkit.data import Preprocessing, preprocess
from vitkit.errors import UsageError
from vitkit.models import evaluating, pictures_below, read_picture
from vitkit_clip.pairs import Pairs, captions
from vitkit_clip.retrieval import check_embeddings, check_towers, embed_images, embed_texts
from vitkit_eval import nearest_items

BATCH = 250
WIDE = 0.75
"""A picture with at least so much of a pair's proportion of width to height is a pair."""


class Gallery(Protocol):
    """What is searched: batches of images as the model takes them, and any of them to be shown."""

    def batches(self) -> Iterator[Tensor]: ...

    def show(self, numbers: list[int]) -> tuple[Tensor, list[str]]:
        """Images `(n c h 2w)` in [0, 1] and what each one is."""
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
    """The pictures below a folder, each as a pair; `skipped` names those that could not be read."""

    folder: Path
    preprocessing: Preprocessing
    most: int
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UsageError(f"there is no folder {self.folder}; give one that holds pictures")
        found = pictures_below(self.folder)
        self.paths: list[Path] = []
        self._found = found[: self.most]

    def batches(self) -> Iterator[Tensor]:
        self.paths.clear()
        self.skipped.clear()
        read: list[Tensor] = []
        for path in self._found:
            try:
                read.append(as_pair(read_picture(path), self.preprocessing))
            except UsageError as error:
                self.skipped.append(str(error))
                continue
            self.paths.append(path)
            if len(read) == BATCH:
                yield torch.cat(read)
                read = []
        if read:
            yield torch.cat(read)
        if not self.paths:
            raise UsageError(f"{self.folder} holds no picture that can be read; {self.skipped[0]}")

    def show(self, numbers: list[int]) -> tuple[Tensor, list[str]]:
        paths = [self.paths[number] for number in numbers]
        pairs = torch.cat([as_pair(read_picture(path), self.preprocessing) for path in paths])
        return shown(pairs, self.preprocessing), [str(path.relative_to(self.folder)) for path in paths]


@dataclass(frozen=True)
class Found:
    """What is nearest, best first: its name and its cosine in [−1, 1]."""

    names: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Answer:
    """To a caption or a picture: the nearest pictures and a sheet of them, and to a picture the nearest captions too."""

    pictures: Found
    sheet: Sheet
    captions: Found | None = None
    unknown: tuple[str, ...] = ()


def as_pair(picture: Image.Image, half: Preprocessing) -> Tensor:
    """A picture of any mode → a normalised pair `(1 c h 2w)`.

    One about as wide as a pair is one; any other stands on both halves.
    """
    channels, height, width = half.shape
    if picture.width * height >= WIDE * 2 * width * picture.height:
        return preprocess([picture], replace(half, shape=(channels, height, 2 * width)))
    one = preprocess([picture], half)
    return torch.cat([one, one], dim=-1)


def shown(pairs: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised `(n c h w)` → [0, 1]."""
    mean, std = (torch.tensor(moments)[:, None, None] for moments in (preprocessing.mean, preprocessing.std))
    return (pairs.cpu() * std + mean).clamp(0, 1)


def find_by_caption(model: Any, caption: str, gallery: Gallery, count: int) -> Answer:
    """The `count` pictures of a gallery that are nearest to a caption; errors as the model's text tower raises them."""
    check_towers(model)
    unknown = getattr(model.text, "unknown_words", None)
    with evaluating(model):
        said = embed_texts(model, [caption])
        pictures, images = _nearest(model, said, gallery, count)
    sheet = Sheet(images.numpy(), _labels(pictures), columns=5)
    return Answer(pictures, sheet, unknown=tuple(dict.fromkeys(unknown(caption))) if unknown else ())


def find_by_picture(model: Any, pair: Tensor, gallery: Gallery, count: int, half: Preprocessing) -> Answer:
    """The captions of the model's classes and the pictures of a gallery that are nearest to a pair `(1 c h 2w)`."""
    said = captions(model.classes)
    with evaluating(model) as device:
        seen = embed_images(model, pair.to(device))
        texts = embed_texts(model, said)
        check_embeddings(seen, texts)
        scores, numbers = nearest_items(seen, texts, count)
        k, best = len(model.classes), int(numbers[0, 0])
        nearest = Found([said[number] for number in numbers[0].tolist()], scores[0].tolist())
        pictures, images = _nearest(model, seen, gallery, count)
    images = torch.cat([shown(pair, half), images])
    sheet = Sheet(
        images.numpy(),
        [f"given: {model.classes[best // k]} | {model.classes[best % k]}", *_labels(pictures)],
        columns=5,
    )
    return Answer(pictures, sheet, captions=nearest)


def _nearest(model: Any, query: Tensor, gallery: Gallery, count: int) -> tuple[Found, Tensor]:
    seen = torch.cat([embed_images(model, images.to(query.device)) for images in gallery.batches()])
    check_embeddings(seen, query)
    scores, numbers = nearest_items(query, seen, count)
    images, names = gallery.show(numbers[0].tolist())
    return Found(names, scores[0].tolist()), images


def _labels(found: Found) -> list[str]:
    return [f"{score:.3f} {name}" for name, score in zip(found.names, found.scores, strict=True)]
