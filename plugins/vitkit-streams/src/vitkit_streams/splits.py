"""What every stream needs to be a dataset: class names, a test split that is held out, and the pixels' moments."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitkit.data import ImageDataset, ImageSplit, Preprocessing, pixel_moments, stratified_indices
from vitkit.errors import DatasetError, UsageError, nearest
from vitkit_streams.images import Samples, StreamedImages, default_workers

LOOKED_AT = 1000
"""Training pictures that mean and standard deviation are taken of."""
CHANNELS = (1, 3)


def check_options(img_size: int, channels: int, workers: int | None, test_size: int) -> None:
    """`UsageError` for an option that is out of range."""
    if img_size < 1:
        raise UsageError(f"img_size is {img_size}; expected at least 1 pixel")
    if channels not in CHANNELS:
        raise UsageError(f"channels is {channels}; expected 3, RGB, or 1, grey")
    if workers is not None and workers < 1:
        raise UsageError(f"workers is {workers}; expected at least 1 thread")
    if test_size < 1:
        raise UsageError(f"test_size is {test_size}; expected at least 1 picture")


def class_names(texts: Sequence[str], given: str | Sequence[str] | None) -> list[str]:
    """The classes of a stream whose labels have these texts.

    `given` is a list of names or a text file with one a line. Without it numbers are classes 0 to the highest, and other
    texts are the names themselves, in alphabetical order.
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
    if all(text.isdecimal() for text in texts):
        highest = max(map(int, texts))
        if highest >= 1_000_000:
            raise DatasetError(f"the label {highest} would make as many classes; give classes, a file with one name a line")
        return [str(number) for number in range(highest + 1)]
    return sorted(set(texts))


def class_number(text: str, names: dict[str, int], where: str) -> int:
    """The class that a label's text means: a name, or else a number. `DatasetError` where there is none such."""
    if text in names:
        return names[text]
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise DatasetError(
        f"{where} has the label {text!r:.80}, which is none of the {len(names)} classes{nearest(text, names)}; "
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
    img_size: int,
    channels: int,
    workers: int | None,
    source: str,
    licence: str,
    hub_id: str = "",
    skipped: Sequence[str] = (),
) -> ImageDataset:
    """A dataset whose training pictures are streamed and whose test pictures, at most `test_size`, are in memory.

    Without samples of its own the test split is held out: up to a fifth of the training pictures, the classes evenly.
    Raises `DatasetError` where too few pictures can be read.
    """
    workers = workers or default_workers()
    nothing_yet = Preprocessing((channels, img_size, img_size), (0.0,) * channels, (1.0,) * channels)

    def split_of(some: Samples, own: Tensor) -> ImageSplit:
        return ImageSplit(StreamedImages(some, torch.arange(len(own)), img_size, channels, workers), own, nothing_yet)

    train = split_of(samples, labels)
    if test is not None:
        held = split_of(*test).stratified_subset(test_size)
    else:
        if len(labels) < 5:
            raise DatasetError(f"{name} has {len(labels)} pictures; a training and a test split need five at least")
        chosen = stratified_indices(labels, min(test_size, len(labels) // 5), seed=0)
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[chosen] = False
        train, held = train.subset(rest.nonzero().squeeze(1)), train.subset(chosen)
    sample = train.stratified_subset(LOOKED_AT)
    looked_at = sample.in_memory()
    if not len(looked_at):
        raise DatasetError(f"none of {len(sample)} pictures of {name} can be read: {'; '.join(train.skipped[:3])}")
    preprocessing = Preprocessing((channels, img_size, img_size), *pixel_moments(looked_at.images))
    found = held.in_memory()
    left_out = [*skipped, *held.skipped]
    return ImageDataset(
        name, classes, replace(train, preprocessing=preprocessing), replace(found, preprocessing=preprocessing), source, licence, hub_id,
        notice=_notice(left_out), skipped=left_out,
    )  # fmt: skip


def _notice(skipped: Sequence[str]) -> str:
    if not skipped:
        return ""
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return f"{len(skipped)} pictures are left out: {'; '.join(skipped[:5])}{more}"
