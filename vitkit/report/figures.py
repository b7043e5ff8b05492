"""Figures of evaluators: confusion matrices, maps of embeddings, attention over images, sheets of images."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from vitkit.contracts import Attention, Confusion, Embeddings, Proportions, ReportFigure, Sheet
from vitkit.report.formatting import title_of
from vitkit.report.proportions import proportions
from vitkit.report.sheet import as_array, sheet
from vitkit.report.style import GRID, HALO, INK, MUTED, PALETTE, Plot, class_labels, drawable

MAX_POINTS = 1_500
"""t-SNE of this many points takes about five seconds on one core."""
MAX_ATTENTION = 16
COUNTS_UP_TO = 20
"""Largest number of classes for which a confusion matrix has room for its counts."""
COLORS = (*PALETTE[:7], "#8c564b", "#1b1b1b", "#9a9a00")
MARKERS = "osD^vPX*<>hpd8"


def draw_figure(name: str, figure: ReportFigure) -> Plot:
    """The plot of a figure. Raises `ValueError` if its arrays do not fit together."""
    drawers: dict[type, Any] = {
        Confusion: confusion, Embeddings: embeddings, Attention: attention, Sheet: sheet, Proportions: proportions,
    }  # fmt: skip
    for kind, draw in drawers.items():
        if isinstance(figure, kind):
            return draw(name, figure)
    raise ValueError(f"a Confusion, Embeddings, Attention, Sheet or Proportions was expected, not {type(figure).__name__}")


def confusion(name: str, given: Confusion) -> Plot:
    """A confusion matrix: rows are true classes, colours are shares of a row, counts stand where there is room."""
    counts = np.nan_to_num(as_array(given.matrix).astype(np.float64))
    k = len(given.classes)
    if counts.shape != (k, k) or k == 0:
        raise ValueError(f"a confusion matrix has shape (k, k) for k class names; got {counts.shape} and {k} names")
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    labels = class_labels(given.classes, 18 if k <= COUNTS_UP_TO else 14)
    side = min(12.0, 2.6 + max(0.44 * k, 1.2)) if k <= COUNTS_UP_TO else 12.0
    figure = Figure(figsize=(side, 0.88 * side), layout="constrained")
    axis = figure.add_subplot()
    # The square root of the share makes one image in a hundred visible beside the other ninety-nine.
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    every = -(-k // 100)
    size = 8.0 if k <= COUNTS_UP_TO else max(5.4, 9.0 - k / 24)
    ticks = range(0, k, every)
    ticked = [labels[tick] for tick in ticks]
    upright = k * max(map(len, labels)) > 60
    axis.set_xticks(ticks, ticked, rotation=90 if upright else 0, fontsize=size)
    axis.set_yticks(ticks, ticked, fontsize=size)
    axis.set(xlabel="predicted", ylabel="true")
    axis.grid(False)
    axis.tick_params(length=2)
    axis.spines[:].set_visible(False)
    if k <= COUNTS_UP_TO:
        _write_counts(axis, counts, shares, 8.0 if k <= 12 else 6.0)
    bar: Any = figure.colorbar(image, ax=axis, shrink=0.6, pad=0.015, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "1 %", "10 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    right, total = int(np.trace(counts)), int(counts.sum())
    summary = f"{right:,} of {total:,} right ({right / total:.2%})." if total else "No samples."
    caption = f"{summary} {_mistakes(counts, given.classes)}".strip()
    alt = f"Confusion matrix of {k} classes: {summary}"
    return Plot(name, title_of(name), figure, alt, caption, wide=k > COUNTS_UP_TO)


def _write_counts(axis: Any, counts: np.ndarray, shares: np.ndarray, size: float) -> None:
    for row, column in np.argwhere(counts > 0):
        color = "white" if shares[row, column] > 0.3 else INK
        axis.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=color, fontsize=size)


def _mistakes(counts: np.ndarray, classes: Sequence[str], most: int = 5) -> str:
    """The most frequent mistakes in a sentence."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(place, wrong.shape) for place in order if wrong.flat[place] > 0]
    if not pairs:
        return ""
    mistakes = (f"“{classes[true]}” taken for “{classes[taken]}” ({wrong[true, taken]:.0f})" for true, taken in pairs)
    return f"Most frequent mistakes: {', '.join(mistakes)}."


def embeddings(name: str, given: Embeddings) -> Plot:
    """Features in two dimensions: PCA, then t-SNE; classes differ in colour and marker."""
    features, labels = as_array(given.features).astype(np.float32), as_array(given.labels).astype(np.int64)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features are (n, d) and labels (n,); got {features.shape} and {labels.shape}")
    finite = np.isfinite(features).all(1)
    dropped = int((~finite).sum())
    features, labels = features[finite], labels[finite]
    total = len(features)
    chosen = _sample(labels, MAX_POINTS)
    features, labels = features[chosen], labels[chosen]
    points, how = plane(features)
    names = class_labels(given.classes, 22)
    present = [int(label) for label in np.unique(labels)]
    few = len(present) <= COUNTS_UP_TO
    figure = Figure(figsize=(7.6, 5.6) if few else (11.5, 7.6), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color(GRID)
    axis.spines[:].set_visible(True)
    handles, legend = [], []
    for label in present:
        is_class = 0 <= label < len(names)
        color, marker = _mark(label) if is_class else (MUTED, ".")
        at = points[labels == label]
        axis.scatter(at[:, 0], at[:, 1], s=13, color=color, marker=marker, alpha=0.75, linewidths=0)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", markersize=5))
        legend.append(names[label] if is_class else f"class {label}")
        middle = at[np.argmin(((at - np.median(at, axis=0)) ** 2).sum(1))]
        axis.annotate(
            legend[-1],
            middle,
            (0, 0 if few else 8),
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK,
            path_effects=HALO,
            fontsize=9.0 if few else 5.5,
            fontweight="bold",
        )
    columns = 1 if few else -(-len(present) // 34)
    figure.legend(handles, legend, loc="outside right upper", ncols=columns, fontsize=8.5 if few else 6.0, handletextpad=0.2)
    count = f"{len(features):,} of {total:,}" if len(features) < total else f"{total:,}"
    caption = f"{count} embeddings, {how}."
    if dropped:
        caption += f" {dropped:,} that are not finite are left out."
    if "t-SNE" in how:
        caption += " Neighbours are meaningful; distances between clusters and axes are not."
    alt = f"Scatter plot of embeddings in two dimensions, coloured by {len(present)} classes."
    return Plot(name, title_of(name), figure, alt, caption, wide=True)


def _mark(label: int) -> tuple[str, str]:
    """A colour and a marker; the first 140 classes have distinct pairs."""
    return COLORS[label % len(COLORS)], MARKERS[label // len(COLORS) % len(MARKERS)]


def plane(features: np.ndarray) -> tuple[np.ndarray, str]:
    """Features `(n, d)` → points `(n, 2)` and the method; the same features always give the same points."""
    n, d = features.shape
    if n < 2 or d == 0 or not np.ptp(features, axis=0).any():
        return np.zeros((n, 2)), "all at one point"
    scale = float(np.abs(features).max())
    reduced = PCA(min(50, d, n), random_state=0).fit_transform((features / scale).astype(np.float64))
    flat = np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))[:, :2]
    if n < 12 or reduced.shape[1] < 3 or len(np.unique(reduced, axis=0)) < 12:
        return flat, "their first two principal components"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # joblib warns where it cannot count the physical cores
        tsne = TSNE(init="pca", perplexity=min(30.0, (n - 1) / 3), max_iter=500, random_state=0)
        return tsne.fit_transform(reduced.astype(np.float32)), f"PCA to {reduced.shape[1]} dimensions, then t-SNE"


def _sample(labels: np.ndarray, most: int) -> np.ndarray:
    """The positions of at most `most` labels, each class in proportion."""
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    return np.sort(by_class[np.linspace(0, len(labels) - 1, most).round().astype(int)])


def attention(name: str, given: Attention) -> Plot:
    """Images above their attention maps, each of which lies over the image in grey."""
    images, maps = as_array(given.images).astype(np.float32), as_array(given.maps).astype(np.float32)
    if images.ndim != 4 or maps.ndim != 3 or not len(images) == len(maps) == len(given.captions) > 0:
        raise ValueError(
            f"images are (n, c, h, w), maps (n, h, w) and captions n texts; "
            f"got {images.shape}, {maps.shape} and {len(given.captions)} captions"
        )
    count = min(len(images), MAX_ATTENTION)
    columns = min(8, count)
    blocks = -(-count // columns)
    figure = Figure(figsize=(1.45 * columns + 0.9, (2 * 1.4 + 0.4) * blocks), layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    shade = None
    for place in range(columns * blocks):
        row, column = 2 * (place // columns), place % columns
        above, below = axes[row, column], axes[row + 1, column]
        for axis in (above, below):
            axis.set_axis_off()
        if place >= count:
            continue
        pixels = np.clip(np.nan_to_num(images[place]), 0, 1)
        height, width = pixels.shape[1:]
        box = (-0.5, width - 0.5, height - 0.5, -0.5)
        grey = pixels.mean(0)
        colored = pixels[:3].transpose(1, 2, 0) if len(pixels) >= 3 else None
        above.imshow(grey if colored is None else colored, cmap="gray", vmin=0, vmax=1, extent=box)
        above.set_title(drawable(str(given.captions[place]), 20), fontsize=8, fontweight="normal", loc="center")
        below.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=box)
        weights = np.clip(np.nan_to_num(maps[place]), 0, 1)
        shade = below.imshow(weights, cmap="inferno", vmin=0, vmax=1, alpha=0.72, extent=box, interpolation="nearest")
    if shade is not None:
        bar: Any = figure.colorbar(shade, ax=axes, shrink=0.5, pad=0.01, aspect=24)
        bar.set_label("attention", color=MUTED)
        bar.outline.set_visible(False)
    left_out = f" {count} of {len(images)} are shown." if count < len(images) else ""
    alt = f"{count} images with their attention maps: {', '.join(map(str, given.captions[:count]))}."
    return Plot(name, title_of(name), figure, alt, f"Above the image, below its attention map.{left_out}", wide=True)
