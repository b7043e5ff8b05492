"""Sheets of images: every pixel as it is, enlarged by a whole number, in rows with captions underneath."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vitkit.files import atomic_write
from vitkit.report.record import pretty
from vitkit.report.style import DPI, INK, Plot, glyphs, one_line

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from vitkit.contracts import Sheet

SIDE = 128
"""Images are enlarged until their longer side has at least so many pixels."""
GAP = 8
FONT, LINE = 17, 21
CAPTION_LINES = 5
MOST_IMAGES = 128
"""So many of a sheet stand in a report."""


def sheet(name: str, picture: "Sheet") -> Plot:
    """The sheet's pixels one to one, for a report."""
    count = len(picture.images)
    few = replace(picture, images=picture.images[:MOST_IMAGES], captions=picture.captions[:MOST_IMAGES])
    pixels = sheet_pixels(few)
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(pixels, origin="upper")
    shown = f"{MOST_IMAGES} of {count} images are shown." if count > MOST_IMAGES else ""
    captions = list(dict.fromkeys(" ".join(str(caption).split()) for caption in picture.captions))
    told = f": {', '.join(captions[:24])}" if captions else ""
    return Plot(name, pretty(name), figure, f"{count} images{told}.", shown, wide=True)


def write_sheet(path: str | Path, picture: "Sheet") -> None:
    """Write a sheet as a PNG file, whole or not at all.

    Raises `ValueError` where its arrays do not fit together and `RunError` where the file cannot be written.
    """
    image = Image.fromarray(sheet_pixels(picture))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def sheet_pixels(picture: "Sheet") -> np.ndarray:
    """A sheet as uint8 `(h w 3)`; the same sheet always gives the same pixels.

    One channel is drawn grey, two as their mean, of more the first three as red, green and blue. What lies outside
    [0, 1] is cut, what is no number is black. Raises `ValueError` where images and captions do not fit together.
    """
    images, captions = as_array(picture.images), [str(caption) for caption in picture.captions]
    if images.ndim != 4 or 0 in images.shape or len(captions) not in (0, len(images)) or picture.columns < 1:
        raise ValueError(
            f"images are (n, c, h, w), captions n texts or none, and columns at least 1; "
            f"got {images.shape}, {len(captions)} captions and {picture.columns} columns"
        )
    pixels = rgb(images)
    n, height, width = pixels.shape[:3]
    scale = max(1, -(-SIDE // max(height, width)))
    height, width, columns = height * scale, width * scale, min(picture.columns, n)
    texts = [_wrapped(caption, width) for caption in captions]
    rows = range(0, n, columns)
    below = [max((len(lines) for lines in texts[row : row + columns]), default=0) * LINE for row in rows]
    tops = np.cumsum([GAP, *(height + lines + GAP for lines in below)])
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, int(tops[-1])), "white")
    draw = ImageDraw.Draw(canvas)
    for place, one in enumerate(pixels):
        row, column = divmod(place, columns)
        left, top = GAP + column * (width + GAP), int(tops[row])
        canvas.paste(Image.fromarray(one.repeat(scale, 0).repeat(scale, 1)), (left, top))
        for line, text in enumerate(texts[place] if texts else ()):
            at = (left + width / 2, top + height + line * LINE + LINE / 2)
            draw.text(at, text, fill=INK, font=_font(), anchor="mm")
    return np.asarray(canvas)


def rgb(images: np.ndarray) -> np.ndarray:
    """Images `(n c h w)` in [0, 1] → uint8 `(n h w 3)`."""
    images = np.clip(np.nan_to_num(images.astype(np.float32), posinf=1.0), 0, 1)
    if images.shape[1] < 3:
        images = images.mean(1, keepdims=True).repeat(3, axis=1)
    return np.round(images[:, :3].transpose(0, 2, 3, 1) * 255).astype(np.uint8)


def as_array(value: Any) -> np.ndarray:
    """A tensor of any device and precision, or anything array-like, as an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _wrapped(caption: str, width: int) -> list[str]:
    """A caption in lines as wide as its image: broken where it has breaks, between words, or else inside them."""
    lines: list[str] = []
    most = width // 4  # no letter is narrower than four pixels
    for part in caption[: most * (CAPTION_LINES + 1)].splitlines():
        lines.append("")
        for word in glyphs(one_line(part)).split():
            longer = f"{lines[-1]} {word}".strip()
            if _fits(longer, width):
                lines[-1] = longer
                continue
            lines += [word] if lines[-1] else []
            lines[-1] = word
            while not _fits(lines[-1], width) and len(lines[-1]) > 1:
                ends = range(min(len(lines[-1]) - 1, most), 0, -1)
                end = next((end for end in ends if _fits(lines[-1][:end], width)), 1)
                lines[-1:] = [lines[-1][:end], lines[-1][end:]]
    if len(lines) > CAPTION_LINES:
        last = lines[CAPTION_LINES - 1]
        while last and not _fits(f"{last}…", width):
            last = last[:-1]
        lines[CAPTION_LINES - 1 :] = [f"{last.rstrip()}…"]
    return lines


def _fits(text: str, width: int) -> bool:
    return _font().getlength(text) <= width


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, FONT, layout_engine=ImageFont.Layout.BASIC)
