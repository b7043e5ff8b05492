"""Sheets of attention: a picture in each row, with maps over it and the colours of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from PIL import Image

from vitkit.report.sheet import as_array

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from vitkit.contracts import Sheet

MAX_COLUMNS = 10
"""With more maps than this a picture takes several rows of the sheet."""
COLORMAP = "inferno"
LEAST_PEAK = 3.0
"""The brightest colour is the highest value of a map, and at least this many times its mean: an even map stays dark."""


@dataclass(frozen=True)
class AttendedPicture:
    """A picture `(c h w)` in [0, 1] with its name, its maps `(rows columns)` by caption, and the colours of its tokens.

    `colours` is `(rows columns 3)` in [0, 1].
    """

    name: str
    picture: Any
    colours: Any
    maps: dict[str, Any] = field(default_factory=dict)


def attention_sheet(pictures: Sequence[AttendedPicture]) -> "Sheet":
    """A sheet with a row for each picture: the picture, each map over it in grey, and the colours of its tokens.

    The brightest colour is the highest value of a map, or three times its mean where no value is that high; the map is interpolated
    between the patches. The second line of its caption is its highest value over its mean: 1 is attention to all patches alike.
    Pictures of one call have the same size and number of maps.
    Raises `ValueError` for none.
    """
    from vitkit.contracts import Sheet

    if not pictures:
        raise ValueError("a sheet of attention needs at least one picture")
    images: list[np.ndarray] = []
    captions: list[str] = []
    columns = min(len(pictures[0].maps) + 2, MAX_COLUMNS)
    for given in pictures:
        picture = as_array(given.picture).astype(np.float32)
        picture = picture[:3] if len(picture) >= 3 else picture.mean(0, keepdims=True).repeat(3, axis=0)
        grey = picture.mean(0, keepdims=True).repeat(3, axis=0)
        colours = _enlarged(as_array(given.colours).transpose(2, 0, 1), picture.shape[1:])
        maps = {caption: as_array(weights) for caption, weights in given.maps.items()}
        row = [(picture, given.name), (colours, "tokens (PCA)")]
        row += [(_over(grey, weights), f"{caption}\n{_peak(weights):.1f}× mean") for caption, weights in maps.items()]
        blank = (np.ones_like(picture), "")
        row += [blank] * (-len(row) % columns)
        images += [image for image, _ in row]
        captions += [caption for _, caption in row]
    return Sheet(np.stack(images), captions, columns)


def _over(grey: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A map `(rows columns)` in colour over a grey picture `(3 h w)`."""
    weights = np.nan_to_num(weights.astype(np.float32))
    brightest = max(float(weights.max()), LEAST_PEAK * float(weights.mean()), 1e-12)
    shares = _enlarged((weights / brightest)[None], grey.shape[1:])[0].clip(0, 1)
    colours = matplotlib.colormaps[COLORMAP](shares)[..., :3].transpose(2, 0, 1)
    opacity = 0.45 + 0.4 * shares
    return (1 - opacity) * grey + opacity * colours


def _peak(weights: np.ndarray) -> float:
    return float(weights.max() / max(float(weights.mean()), 1e-12))


def _enlarged(channels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Channels `(c rows columns)` → `(c h w)`, by bicubic interpolation."""
    height, width = size
    planes = [Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32), mode="F") for plane in channels]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes])


__all__ = ["AttendedPicture", "attention_sheet"]
