"""A run's plots, as matplotlib figures that need no display."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitkit.contracts import Attention, Confusion, Embeddings, Picture

# Okabe and Ito's colours, told apart by colour-blind readers too; black is left for reference lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A900")
POINTS = 2_000
Rows = Sequence[Mapping[str, float | None]]
NOT_METRICS = ("epoch", "step", "loss")
NOT_PARTS = ("epoch", "step", "lr", "images_per_second", "seconds")


def plain_text(text: str) -> str:
    """A name as matplotlib should print it: `$` would begin mathematics."""
    return text.replace("$", r"\$")


def run_plots(losses: Rows, metrics: Rows, summary: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures that a run's tables give: losses, bounded parts, metrics, and the final retrieval bars."""
    references: Mapping[str, Mapping[str, float]] = summary.get("references") or {}
    protocols: Mapping[str, Mapping[str, Any]] = summary.get("protocols") or {}
    figures = {}
    parts = [name for name in _columns(losses) if name not in NOT_PARTS]
    if parts:
        figures["loss"] = _curves({name: _series(losses, name) for name in parts}, "loss and its parts")
    for name in parts:
        bounds = {label: lines[name] for label, lines in references.items() if name in lines}
        if bounds:
            figures[name] = _bounded(name, _series(losses, name), bounds)
    names = [name for name in _columns(metrics) if name not in NOT_METRICS]
    if names:
        figures["metrics"] = metric_panels({"": metrics}, names, references, protocols)
    shares = {name: value for name, value in (summary.get("final") or {}).items() if name in names and "_top" in name}
    if shares:
        figures["final"] = _bars(shares, references, protocols)
    return figures


def metric_panels(
    runs: Mapping[str, Rows],
    names: Sequence[str],
    references: Mapping[str, Mapping[str, float]],
    protocols: Mapping[str, Mapping[str, Any]],
) -> Figure:
    """One panel a metric, every run a curve, with its chance level and reference lines."""
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    figure = _figure(4.4 * across, 3.1 * down)
    for index, name in enumerate(names):
        axes = figure.add_subplot(down, across, index + 1)
        for number, (label, rows) in enumerate(runs.items()):
            x, y = _series(rows, name)
            if len(x):
                axes.plot(x, y, "o-", markersize=3, color=COLOURS[number % len(COLOURS)], label=plain_text(label) or None)
        chance = (protocols.get(name) or {}).get("chance")
        if chance is not None:
            axes.axhline(chance, color="#888888", linestyle=":", label="chance")
        for style, (label, lines) in zip(("--", "-.", (0, (1, 3))), references.items(), strict=False):
            if name in lines:
                axes.axhline(lines[name], color="#333333", linestyle=style, label=plain_text(label))
        axes.set_title(plain_text(name))
        axes.set_xlabel("epoch")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def picture_plot(name: str, picture: Picture) -> Figure:
    """The figure of one picture."""
    if isinstance(picture, Confusion):
        return _confusion(name, picture)
    if isinstance(picture, Embeddings):
        return _embeddings(name, picture)
    return _attention(name, picture)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


def _series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The epochs and values of a column, where there are any."""
    pairs = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    return [float(x or 0) for x, _ in pairs], [float(y) for _, y in pairs if y is not None]


def _curves(series: Mapping[str, tuple[list[float], list[float]]], title: str) -> Figure:
    figure = _figure(7.2, 3.6)
    axes = figure.add_subplot()
    for (name, (x, y)), colour in zip(series.items(), COLOURS * 9, strict=False):
        axes.plot(x, y, "-" if len(x) > 1 else "o", color=colour, label=plain_text(name))
    values = [value for _, y in series.values() for value in y if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.legend()
    return figure


def _bounded(name: str, series: tuple[list[float], list[float]], bounds: Mapping[str, float]) -> Figure:
    """A part of the loss between the values it can take."""
    figure = _figure(7.2, 3.4)
    axes = figure.add_subplot()
    axes.plot(*series, "o-", markersize=3, color=COLOURS[0], label=plain_text(name))
    for (label, value), colour in zip(bounds.items(), ("#009E73", "#D55E00", "#888888"), strict=False):
        axes.axhline(value, color=colour, linestyle="--", label=f"{plain_text(label)}: {value:.4g}")
    axes.set_yscale("log")
    axes.set_title(f"{plain_text(name)} between its {' and '.join(map(plain_text, bounds))}")
    axes.set_xlabel("epoch")
    axes.legend()
    return figure


def _bars(
    shares: Mapping[str, float],
    references: Mapping[str, Mapping[str, float]],
    protocols: Mapping[str, Mapping[str, Any]],
) -> Figure:
    figure = _figure(max(5.0, 1.1 * len(shares) + 1.5), 3.6)
    axes = figure.add_subplot()
    for index, (name, value) in enumerate(shares.items()):
        axes.bar(index, value, width=0.6, color=COLOURS[0], label="this run" if index == 0 else None)
        axes.text(index, value + 0.015, f"{value:.3f}", ha="center", fontsize="small")
        chance = (protocols.get(name) or {}).get("chance")
        if chance is not None:
            axes.hlines(chance, index - 0.38, index + 0.38, color="#888888", linestyle=":", label=None if index else "chance")
        for label, lines in references.items():
            if name in lines:
                axes.hlines(lines[name], index - 0.38, index + 0.38, color="#D55E00", linewidth=2, label=plain_text(label))
    axes.set_xticks(range(len(shares)), [plain_text(name) for name in shares], rotation=20, ha="right")
    axes.set_ylim(0, 1.12)
    axes.set_title("after the last evaluation")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), fontsize="small", loc="lower right")
    return figure


def _confusion(name: str, picture: Confusion) -> Figure:
    matrix = np.asarray(picture.matrix, dtype=float)
    k = len(matrix)
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    few = k <= 20
    side = 1.8 + 0.42 * k if few else 9.0
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the true class")
    if few:
        for row in range(k):
            for column in range(k):
                if matrix[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    labels = [plain_text(_short(label)) for label in picture.classes]
    size = 9 if few else 4
    axes.set_xticks(range(k), labels, rotation=90 if max(map(len, labels), default=0) > 2 else 0, fontsize=size)
    axes.set_yticks(range(k), labels, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{plain_text(name.replace('_', ' '))}: {np.trace(matrix) / max(matrix.sum(), 1):.2%} right")
    return figure


def _embeddings(name: str, picture: Embeddings) -> Figure:
    features, labels = np.asarray(picture.features, dtype=np.float32), np.asarray(picture.labels)
    if len(features) > POINTS:
        chosen = np.random.default_rng(0).choice(len(features), POINTS, replace=False)
        features, labels = features[chosen], labels[chosen]
    points = _flatten(features)
    figure = _figure(7.2, 6.0)
    axes = figure.add_subplot()
    present = np.unique(labels)
    colours = _many_colours(len(present))
    for label, colour in zip(present, colours, strict=True):
        mask = labels == label
        name_of = plain_text(_short(picture.classes[int(label)])) if len(present) <= 20 else None
        axes.scatter(points[mask, 0], points[mask, 1], s=7, color=colour, label=name_of, linewidths=0)
    if len(present) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2.5, fontsize="small")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"{plain_text(name.replace('_', ' '))} (t-SNE of {len(points):,})")
    return figure


def _flatten(features: np.ndarray) -> np.ndarray:
    """Features in two dimensions: principal components, then t-SNE where there are enough points."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n, d = features.shape
    reduced = PCA(min(30, n, d), random_state=0).fit_transform(features)
    if n < 10 or reduced.shape[1] < 3:
        padded: np.ndarray = np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))[:, :2]
        return padded
    flat: np.ndarray = TSNE(2, perplexity=min(30.0, (n - 1) / 3), random_state=0, max_iter=500).fit_transform(reduced)
    return flat


def _attention(name: str, picture: Attention) -> Figure:
    images, maps = np.asarray(picture.images), np.asarray(picture.maps)
    n = len(images)
    across = min(8, n)
    down = math.ceil(n / across)
    figure = _figure(1.25 * across, 2.75 * down + 0.4)
    axes: list[Axes] = []
    for index in range(n):
        row, column = divmod(index, across)
        picture_of = images[index].transpose(1, 2, 0).clip(0, 1)
        grey = picture_of.mean(axis=2)
        for half in (0, 1):
            spot = figure.add_subplot(2 * down, across, (2 * row + half) * across + column + 1)
            if half == 0:
                spot.imshow(grey if picture_of.shape[2] == 1 else picture_of, cmap="gray", vmin=0, vmax=1)
                spot.set_title(plain_text(_short(picture.captions[index])), fontsize=8)
            else:
                spot.imshow(grey, cmap="gray", vmin=0, vmax=1)
                spot.imshow(maps[index], cmap="inferno", alpha=0.7, interpolation="nearest")
            spot.set_axis_off()
            axes.append(spot)
    figure.suptitle(plain_text(name.replace("_", " ")))
    return figure


def _many_colours(count: int) -> list[Any]:
    if count <= 10:
        return [*COLOURS, "#000000", "#8C564B", "#7F7FFF"][:count]
    from matplotlib import colormaps

    return [colormaps["turbo"](index / max(count - 1, 1)) for index in range(count)]


def _short(text: str, length: int = 18) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
