"""Decoding of image files, for import, embed, predict, search and streams.

Only the formats in `FORMATS` are opened; a file's name does not matter. An image is turned upright by its EXIF orientation and
laid on white if it is transparent; 16-bit grey becomes 8-bit; only the first image of an animation or a TIFF with several pages is
decoded. Memory is bounded: an image has at most Pillow's `Image.MAX_IMAGE_PIXELS` pixels and its file at most
`MAX_FILE_BYTES`, and threads that decode at the same time hold about `DECODED_BYTES` together, or one larger image.

Pillow's `Image.open` warns of large images, and a warning filter would change the whole process. Therefore this module calls Pillow's
plugins directly.
"""

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator
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
MAX_FILE_BYTES = 256 << 20
DECODED_BYTES = 512 << 20
BYTES_PER_PIXEL = 9
"""Memory that decoding takes at its peak: the pixels as stored, and as RGBA before and after multiplication by alpha."""
TRIM_BYTES = 64 << 20
"""After an image that took more than this, the C library returns its free memory to the system."""
SPARE_FACTOR = 3
"""An image is reduced early to no less than this multiple of the size that is wanted."""


def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`: without it each thread keeps the memory of the largest images that it decoded."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None


class ImageReadError(ValueError):
    """A file is no image that can be decoded; the message gives the reason without the file's name."""


class MemoryBudget:
    """A number of bytes that threads share: `held(size)` waits until `size` more bytes fit, or until no thread holds any."""

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
_malloc_trim = _trim()


def read_image(file: Path | str | bytes, *, least: tuple[int, int] | None = None) -> Image.Image:
    """An image file, or its content as bytes → a Pillow image in the mode RGB or L, upright, without transparency.

    With `least` (height, width) a large image is reduced while it is decoded, to at least `SPARE_FACTOR` times that size. Raises
    `ImageReadError`.
    """
    if least is None:
        return _decoded(file, lambda image: on_white(in_colour(image)))
    enough = (SPARE_FACTOR * least[1], SPARE_FACTOR * least[0])
    return _decoded(file, lambda image: on_white(reduced(in_colour(image), least)), draft=("RGB", enough))


def read_square(file: Path | str | bytes, size: int, channels: int = 3) -> Tensor:
    """An image file, or its content as bytes → its middle square, uint8 `(channels size size)`, RGB or grey.

    Raises `ImageReadError`.
    """
    mode = "RGB" if channels == 3 else "L"

    def middle(image: Image.Image) -> Image.Image:
        image = in_colour(image)
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
        return on_white(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))

    square = _decoded(file, middle, draft=(mode, (2 * size, 2 * size)))
    return torch.from_numpy(np.array(square.convert(mode))).view(size, size, channels).permute(2, 0, 1)


def in_colour(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode → one in the mode L, RGB or, where it has transparency, RGBA."""
    if image.mode.startswith("I"):  # convert() would cut 16 bits to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("L", "1", "F") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image on a white background, as RGB; any other image is returned unchanged."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def reduced(image: Image.Image, least: tuple[int, int]) -> Image.Image:
    """The image divided by a whole number where it has more than twice `SPARE_FACTOR` times `least` (height, width)."""
    factor = min(length // (SPARE_FACTOR * side) for length, side in zip(image.size, reversed(least), strict=True))
    if factor < 2:
        return image
    width, height = image.size
    # resize() multiplies RGBA by alpha first; reduce() does not.
    return image.resize((-(-width // factor), -(-height // factor)), Image.Resampling.BOX)


def _decoded(
    file: Path | str | bytes, finish: Callable[[Image.Image], Image.Image], *, draft: tuple[str, tuple[int, int]] | None = None
) -> Image.Image:
    """The result of `finish` on the upright image, within the memory budget.

    With `draft` (mode, size) a JPEG may be decoded at a fraction of its size, but at least at this size.
    """
    try:
        with _stream(file) as stream:
            image = _identified(stream)
            limit = Image.MAX_IMAGE_PIXELS
            width, height = image.size
            if limit is not None and width * height > limit:
                raise ImageReadError(
                    f"{width}×{height} pixels are more than the {limit:,} that an image may have: it could be a decompression bomb"
                )
            if draft is not None:
                image.draft(*draft)
            size = image.width * image.height * BYTES_PER_PIXEL
            with _budget.held(size):
                image.load()
                with suppress(Exception):  # damaged EXIF data: the image is not turned
                    ImageOps.exif_transpose(image, in_place=True)
                result = finish(image)
                del image
                if size > TRIM_BYTES and _malloc_trim is not None:
                    _malloc_trim(0)
                return result
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
        if size > MAX_FILE_BYTES:
            raise ImageReadError(f"the file has {size:,} bytes; expected at most {MAX_FILE_BYTES:,}")
        yield stream


def _identified(stream: BinaryIO) -> Any:
    """Pillow's image object; its header is read, its pixels are not."""
    prefix = stream.read(16)
    for factory, accept in _openers():
        stream.seek(0)
        if accept is None or accept(prefix) is True:  # accept() returns a text if the format is not installed
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # as in Image.open: the plugin does not know this file
                return factory(stream, "")
    raise UnidentifiedImageError(f"cannot identify image file; expected {', '.join(FORMATS)}")


@cache
def _openers() -> list[tuple[Any, Any]]:
    for name in FORMATS:
        with suppress(ImportError):  # Pillow has AVIF from 11.3 on
            import_module(f"PIL.{name.title().replace('Webp', 'WebP')}ImagePlugin")
    return [Image.OPEN[name] for name in FORMATS if name in Image.OPEN]


__all__ = [
    "FORMATS", "MAX_FILE_BYTES", "SUFFIXES", "ImageReadError", "MemoryBudget", "in_colour", "on_white", "read_image", "read_square",
    "reduced",
]  # fmt: skip
