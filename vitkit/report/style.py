"""The style of figures: one palette and the font of matplotlib, drawn by Agg without global state."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#7f7f7f")
"""The colours of Okabe and Ito, which people with any kind of colour vision can distinguish."""
DPI = 150
INK, MUTED, GRID = "#1f2430", "#667085", "#e6e8ec"
HALO = [withStroke(linewidth=2.5, foreground="white")]
RC_PARAMS: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#b8bec9",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Plot:
    """A figure with its title, a text for people who cannot see it, and a caption."""

    name: str
    title: str
    figure: Figure
    alt: str
    caption: str = ""
    wide: bool = False


@contextmanager
def house_style() -> Iterator[None]:
    """A context in which figures look the same on every machine: no matplotlibrc is used."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC_PARAMS)
        yield


def panels(count: int, *, height: float = 2.9, width: float = 11.1) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes over epochs; several are as wide as the page. Sizes are in inches."""
    columns = count if count in (1, 2, 4) else 3
    rows = math.ceil(count / columns)
    size = (5.6, 3.4) if count == 1 else (width, height * rows)
    layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.08, w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=size, layout=layout)
    axes = [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, axes


def legend_below(axes: Axes, handles: Sequence[Artist], labels: Sequence[str], columns: int = 2) -> None:
    """Put a legend under the axes, where it hides no data."""
    axes.legend(
        handles,
        [drawable(label, 40) for label in labels],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.24),
        ncols=columns,
        handlelength=1.8,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def png(figure: Figure, dpi: int = DPI, software: str = "vitkit") -> bytes:
    """The figure as the bytes of a PNG file, which names the `software` that wrote it."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": software})
    return buffer.getvalue()


def drawable(text: str, limit: int = 60) -> str:
    """The text as matplotlib can draw it: one line of at most `limit` letters, no formulas, □ for missing glyphs."""
    text = one_line(text)
    if len(text) > limit:  # the end is as distinctive as the beginning
        tail = limit // 3
        text = f"{text[: limit - tail - 1].rstrip()}…{text[-tail:].lstrip()}"
    text = glyphs(text).replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text  # a legend leaves out labels that begin with an underscore


def one_line(text: str) -> str:
    """The text with a space in place of line breaks and of letters that cannot be printed."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def glyphs(text: str) -> str:
    """The text with □ in place of letters that the font lacks."""
    return "".join(letter if _has_glyph(letter) else "□" for letter in text)


def class_labels(classes: Sequence[str], limit: int = 20) -> list[str]:
    """A label for each class: its name, or its number if the font lacks a letter of the name."""
    labels = []
    for place, name in enumerate(classes):
        label = drawable(str(name), limit)
        labels.append(f"#{place}" if "□" in label or not label else label)
    return labels


@cache
def _has_glyph(letter: str) -> bool:
    font = get_font(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    return bool(font.get_char_index(ord(letter)))
