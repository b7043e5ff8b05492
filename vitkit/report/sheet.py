"""Sheets of images: each pixel becomes a square of equal pixels, in rows with captions below the images.

`torchvision.utils.make_grid` is not used: it draws no captions, gives all rows the same height, and imports torch.
"""

import textwrap
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from vitkit.files import atomic_write
from vitkit.report.formatting import title_of
from vitkit.report.style import DPI, INK, Plot, glyphs, one_line

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from vitkit.contracts import Sheet

SIDE = 128
"""Images are enlarged until their longer side has at least this many pixels."""
GAP = 8
"""Pixels between images."""
FONT, LINE = 14, 18
"""Height of letters and of lines in pixels."""
CAPTION_LINES = 5
SOFTWARE = "vitkit sheet"
"""The text that marks a PNG file as written by `write_sheet`."""
MAX_IMAGES = 128
"""Number of images that a report shows of one sheet."""


def sheet(name: str, given: "Sheet") -> Plot:
    """The plot of a sheet; each pixel of the sheet is a pixel of the plot."""
    count = len(given.images)
    pixels = sheet_pixels(replace(given, images=given.images[:MAX_IMAGES], captions=given.captions[:MAX_IMAGES]))
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(pixels, origin="upper")
    cut = f"{MAX_IMAGES} of {count} images are shown." if count > MAX_IMAGES else ""
    captions = list(dict.fromkeys(" ".join(str(caption).split()) for caption in given.captions))
    listed = f": {', '.join(captions[:24])}" if captions else ""
    return Plot(name, title_of(name), figure, f"{count} images{listed}.", cut, wide=True)


def write_sheet(path: str | Path, given: "Sheet") -> None:
    """Write a sheet as a PNG file, completely or not at all.

    Raises `ValueError` if its arrays do not fit together and `RunError` if the file cannot be written.
    """
    image, info = Image.fromarray(sheet_pixels(given)), PngInfo()
    info.add_text("Software", SOFTWARE)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def is_sheet(path: str | Path) -> bool:
    """Whether a file is a PNG that `write_sheet` wrote, so that a command may replace it."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError):
        return False


def sheet_pixels(given: "Sheet") -> np.ndarray:
    """A sheet as uint8 `(h w 3)`; the same sheet always gives the same pixels.

    One channel is drawn in grey, two as their mean, and of more channels the first three as red, green and blue. Values
    outside [0, 1] are clipped, NaN is black. Raises `ValueError` if images and captions do not fit together.
    """
    images, captions = as_array(given.images), [str(caption) for caption in given.captions]
    if images.ndim != 4 or 0 in images.shape or len(captions) not in (0, len(images)) or given.columns < 1:
        raise ValueError(
            f"images are (n, c, h, w), captions n texts or none, and columns at least 1; "
            f"got {images.shape}, {len(captions)} captions and {given.columns} columns"
        )
    pixels = rgb(images)
    n, height, width = pixels.shape[:3]
    scale = max(1, -(-SIDE // max(height, width)))
    height, width, columns = height * scale, width * scale, min(given.columns, n)
    texts = [_wrapped(caption, width) for caption in captions]
    rows = range(0, n, columns)
    below = [max((len(lines) for lines in texts[row : row + columns]), default=0) * LINE for row in rows]
    tops = np.cumsum([GAP, *(height + lines + GAP for lines in below)])
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, int(tops[-1])), "white")
    draw = ImageDraw.Draw(canvas)
    for place, image in enumerate(pixels):
        row, column = divmod(place, columns)
        left, top = GAP + column * (width + GAP), int(tops[row])
        canvas.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (left, top))
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
    """A tensor on any device and of any precision, or anything like an array, as an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _wrapped(caption: str, width: int) -> list[str]:
    """A caption in lines that fit into `width` pixels, broken at its own line breaks, between words, or inside long words."""
    letters = max(1, int(width // _font().getlength("m")))
    parts = [glyphs(one_line(part)) for part in caption[: letters * (CAPTION_LINES + 1)].splitlines()]
    lines = [line for part in parts for line in textwrap.wrap(part, letters) or [""]]
    if len(lines) > CAPTION_LINES:
        lines[CAPTION_LINES - 1 :] = [f"{lines[CAPTION_LINES - 1][: letters - 1].rstrip()}…"]
    return lines


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    return ImageFont.truetype(path, FONT, layout_engine=ImageFont.Layout.BASIC)
