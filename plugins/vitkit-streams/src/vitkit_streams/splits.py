"""From a stream to a dataset: class names, held-out validation and test splits, and mean and standard deviation of the pixels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitkit.data import (
    ImageDataset,
    ImageSplit,
    Preprocessing,
    class_order,
    held_out,
    pixel_moments,
    stratified_indices,
)
from vitkit.errors import DatasetError, UsageError, nearest, printable
from vitkit.validation import at_least
from vitkit_streams.images import Samples, StreamedImages, default_workers

MOMENTS_IMAGES = 1000
"""Training images that mean and standard deviation are computed from."""
CHANNELS = (1, 3)
MAX_DIGITS = 12
"""Most digits of a label that is a number; a longer text of digits is a name."""


def check_options(img_size: int, channels: int, workers: int | None, test_size: int, val_size: int | None) -> None:
    """`UsageError` for an option that is out of range."""
    at_least(1, img_size=img_size, workers=workers, test_size=test_size)
    at_least(0, val_size=val_size)
    if channels not in CHANNELS:
        raise UsageError(f"channels is {channels}; expected 3, RGB, or 1, grey")


def class_names(texts: Sequence[str], given: str | Sequence[str] | None) -> list[str]:
    """The classes of a stream whose labels have these texts.

    `given` is a list of names, or a text file with one name in each line. Without it numbers are the classes from 0 to the highest, and
    other texts are names, in the order of `class_order`.
    """
    if given is not None:
        if isinstance(given, str):
            path = Path(given).expanduser()
            if not path.is_file():
                raise DatasetError(f"no file of class names at {path}; give classes a text file with one name a line")
            given = path.read_text(encoding="utf-8").splitlines()
        names = [str(name).strip() for name in given if str(name).strip()]
        if len(set(names)) < len(names) or len(names) < 2:
            raise UsageError(f"classes are {', '.join(names[:20])!r}; expected at least two different names")
        return names
    if all(map(_is_number, texts)):
        highest = max(map(int, texts))
        if highest >= 1_000_000:
            raise DatasetError(f"the label {highest} would make as many classes; give classes, a file with one name a line")
        return [str(number) for number in range(highest + 1)]
    return sorted(set(texts), key=class_order)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MAX_DIGITS


def class_number(text: str, names: dict[str, int], where: str) -> int:
    """The class of a label's text, a name or else a number; `DatasetError` if there is no such class."""
    if text in names:
        return names[text]
    if _is_number(text) and int(text) < len(names):
        return int(text)
    raise DatasetError(
        f"{where} has the label {printable(text, 80)!r}, which is not one of the {len(names)} classes{nearest(text, names)}; "
        f"they are {', '.join(list(names)[:10])}{', ...' if len(names) > 10 else ''}"
    )


def assemble(
    name: str,
    samples: Samples,
    labels: Tensor,
    classes: list[str],
    *,
    test: tuple[Samples, Tensor] | None,
    test_size: int,
    val_size: int | None,
    img_size: int,
    channels: int,
    workers: int | None,
    source: str,
    licence: str,
    hub_id: str = "",
    skipped: Sequence[str] = (),
) -> ImageDataset:
    """A dataset whose training images are streamed; its test and validation images, at most `test_size` each, are in memory.

    Without test samples up to a fifth of the training images are held out, evenly over the classes. `val_size` training images are
    for validation, by default a tenth and at most `test_size`. Raises `DatasetError` if too few images can be read.
    """
    workers = workers or default_workers()
    unscaled = Preprocessing((channels, img_size, img_size), (0.0,) * channels, (1.0,) * channels)

    def split_of(some: Samples, targets: Tensor) -> ImageSplit:
        return ImageSplit(StreamedImages(some, torch.arange(len(targets)), img_size, channels, workers), targets, unscaled)

    train = split_of(samples, labels)
    if test is not None:
        held = split_of(*test).stratified_subset(test_size)
    else:
        if len(labels) < 5:
            raise DatasetError(f"{name} has {len(labels)} images; expected at least five, for a training and a test split")
        chosen = stratified_indices(labels, min(test_size, len(labels) // 5), seed=0)
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[chosen] = False
        train, held = train.subset(rest.nonzero().squeeze(1)), train.subset(chosen)
    train, val, val_note = held_out(train, min(len(train) // 10, test_size) if val_size is None else val_size)
    sample = train.stratified_subset(MOMENTS_IMAGES)
    readable = sample.in_memory()
    if not len(readable):
        raise DatasetError(f"none of {len(sample)} images of {name} can be read: {'; '.join(train.skipped[:3])}")
    preprocessing = Preprocessing((channels, img_size, img_size), *pixel_moments(readable.images))
    train, val_images, test_images = (replace(split, preprocessing=preprocessing) for split in (train, val.in_memory(), held.in_memory()))
    left_out = [*skipped, *val.skipped, *(line for line in held.skipped if line not in val.skipped)]
    return ImageDataset(
        name, classes, train, test_images, source, licence, hub_id, notice=_notice(left_out), skipped=left_out, val=val_images,
        val_note=val_note,
    )  # fmt: skip


def _notice(skipped: Sequence[str]) -> str:
    if not skipped:
        return ""
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return f"{len(skipped)} images are left out: {'; '.join(skipped[:5])}{more}"
