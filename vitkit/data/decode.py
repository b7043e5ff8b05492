"""Image files to pixels: the one decoder of import, embed, predict, search and streams.

Formats are those of `FORMATS`; nothing else is opened, whatever a file's name says. An image is turned upright by its EXIF
orientation and laid on white where it is transparent; 16-bit grey becomes 8-bit; of an animation or a TIFF with several pages the
first one is taken. Memory is bounded: an image has at most Pillow's `Image.MAX_IMAGE_PIXELS` pixels and its file at most
`LARGEST_FILE_BYTES`, and threads that decode at the same time hold about `DECODED_BYTES` together, or one image.

Pillow's `Image.open` warns of large images, and filters of warnings belong to the whole process. So its plugins are called here, and
no filter is changed.
"""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Endings of image files, in lower case."""
LARGEST_FILE_BYTES = 256 << 20
DECODED_BYTES = 512 << 20
BYTES_PER_PIXEL = 9
"""Memory that decoding takes at its peak: the pixels as stored, and as RGBA before and after multiplication by alpha."""
SPARE_FACTOR = 3
"""An image is reduced early to no less than this multiple of the size that is wanted."""


class ImageReadError(ValueError):
    """A file is no image that can be decoded; the message gives the reason without the file's name."""


class MemoryBudget:
    """Bytes that threads share: `held(size)` waits until they fit, or until nobody else holds any."""

    def __init__(self, limit: int) -> None:
        self.limit, self._used, self._change = limit, 0, threading.Condition()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: self._used == 0 or self._used + size <= self.limit)
            self._used += size
        try:
            yield
        finally:
            with self._change:
                self._used -= size
                self._change.notify_all()


_budget = MemoryBudget(DECODED_BYTES)


def read_image(file: Path | str | bytes, *, least: tuple[int, int] | None = None) -> Image.Image:
    """An image file, or its content as bytes → a Pillow image in the mode RGB or L, upright, without transparency.

    With `least` (height, width) a large image is reduced while it is decoded, to at least `SPARE_FACTOR` times that size. Raises
    `ImageReadError`.
    """
    with _decoded(file, "RGB", tuple(SPARE_FACTOR * side for side in reversed(least)) if least else None) as image:
        return on_white(reduced(in_colour(image), least) if least else in_colour(image))


def read_square(file: Path | str | bytes, size: int, channels: int = 3) -> Tensor:
    """An image file, or its content as bytes → its middle square, uint8 `(channels size size)`, RGB or grey.

    Raises `ImageReadError`.
    """
    with _decoded(file, "RGB" if channels == 3 else "L", (2 * size, 2 * size)) as image:
        image = in_colour(image)
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
        square = on_white(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
    pixels = np.array(square.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(pixels).view(size, size, channels).permute(2, 0, 1)


def in_colour(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode → one in the mode L, RGB or, where it has transparency, RGBA."""
    if image.mode.startswith("I"):  # convert() would cut 16 bits to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("L", "1", "F") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def on_white(image: Image.Image) -> Image.Image:
    """An image in the mode RGBA becomes RGB on a white ground; another stays as it is."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def reduced(image: Image.Image, least: tuple[int, int]) -> Image.Image:
    """The image divided by a whole number where it has more than twice `SPARE_FACTOR` times `least` (height, width)."""
    factor = min(length // (SPARE_FACTOR * side) for length, side in zip(image.size, reversed(least), strict=True))
    if factor < 2:
        return image
    width, height = image.size
    # Of RGBA, resize() multiplies by alpha first; reduce() does not.
    return image.resize((-(-width // factor), -(-height // factor)), Image.Resampling.BOX)


@contextmanager
def _decoded(file: Path | str | bytes, mode: str, enough: Any) -> Iterator[Image.Image]:
    """The loaded image, upright, while its memory is accounted for; a JPEG may be decoded at a fraction down to `enough` (w, h)."""
    try:
        with _stream(file) as stream:
            image = _identified(stream)
            limit = Image.MAX_IMAGE_PIXELS
            width, height = image.size
            if limit is not None and width * height > limit:
                raise ImageReadError(
                    f"{width}×{height} pixels are more than the {limit:,} that an image may have: it could be a decompression bomb"
                )
            if enough:
                image.draft(mode, enough)
            with _budget.held(image.width * image.height * BYTES_PER_PIXEL):
                image.load()
                with suppress(Exception):  # damaged EXIF data: the image stays as it lies
                    ImageOps.exif_transpose(image, in_place=True)
                yield image
    except ImageReadError:
        raise
    except UnidentifiedImageError as error:
        raise ImageReadError(f"UnidentifiedImageError: {error}") from None
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        raise ImageReadError(f"{type(error).__name__}: {error}") from None


@contextmanager
def _stream(file: Path | str | bytes) -> Iterator[BinaryIO]:
    if not isinstance(file, bytes) and not Path(file).is_file():  # a pipe would wait for its writer
        raise ImageReadError("it is not a regular file" if Path(file).exists() else "there is no such file")
    with BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if size > LARGEST_FILE_BYTES:
            raise ImageReadError(f"the file has {size:,} bytes; expected at most {LARGEST_FILE_BYTES:,}")
        yield stream


def _identified(stream: BinaryIO) -> Any:
    """Pillow's image object, its header read and its pixels not."""
    prefix = stream.read(16)
    for factory, accept in _openers():
        stream.seek(0)
        if accept is None or accept(prefix) is True:  # a text says that the format is not installed
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # as Image.open does: this plugin does not know it
                return factory(stream, "")
    raise UnidentifiedImageError(f"cannot identify image file; expected {', '.join(FORMATS)}")


@cache
def _openers() -> list[tuple[Any, Any]]:
    for name in FORMATS:
        with suppress(ImportError):  # Pillow has AVIF from 11.3 on
            import_module(f"PIL.{name.title().replace('Webp', 'WebP')}ImagePlugin")
    return [Image.OPEN[name] for name in FORMATS if name in Image.OPEN]


__all__ = [
    "FORMATS", "LARGEST_FILE_BYTES", "SUFFIXES", "ImageReadError", "MemoryBudget", "in_colour", "on_white", "read_image", "read_square",
    "reduced",
]  # fmt: skip
