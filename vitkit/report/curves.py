"""What a run's tables look like: losses, metrics and statistics over epochs, and final accuracies as bars."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vitkit.report.record import Record, Series, plain, pretty, shown, split_topk
from vitkit.report.style import HALO, INK, MUTED, PALETTE, Plot, drawable, legend_below, panels
from vitkit.runs.summary import lower_is_better

PACE = {"lr": "learning rate", "images_per_second": "images/s"}
WIDE_RANGE = 10.0
"""From this ratio of the largest to the smallest value on, an axis is logarithmic."""


def draw(axes: Axes, series: Series, *, color: str, linestyle: str = "-") -> Line2D:
    """One column over epochs; with markers where a line alone would hide points."""
    lonely = len(series.values) <= 15 or not np.isfinite(series.values).all()
    marker = "o" if lonely else None
    (line,) = axes.plot(series.epochs, series.values, color=color, linestyle=linestyle, marker=marker)
    return line


def fit_axes(axes: Axes, columns: Iterable[Series], *, shares: bool = False, from_zero: bool = False) -> None:
    """Limits and scale: [0, 1] for shares, from 0 where asked, else logarithmic where values span decades."""
    columns = list(columns)
    epochs = np.concatenate([series.epochs for series in columns])
    if epochs.min() == epochs.max():
        axes.set_xlim(epochs.min() - 1, epochs.max() + 1)
    values = np.concatenate([series.finite for series in columns])
    if shares:
        axes.set_ylim(-0.02, 1.04)
    elif from_zero:
        axes.set_ylim(min(0.0, values.min(initial=0.0)), 1.08 * values.max(initial=0.0) or 1.0)
    elif len(values) and values.min() > 0 and values.max() > WIDE_RANGE * values.min():
        logarithmic(axes)


def logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers on it."""
    axes.set_yscale("log")
    decades = np.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def are_shares(values: Iterable[float | None]) -> bool:
    """Whether all of these lie between 0 and 1."""
    return all(0.0 <= value <= 1.0 for value in values if value is not None and np.isfinite(value))


def losses(record: Record) -> Plot | None:
    """A panel for the loss and for each of its parts."""
    columns = {name: series for name, series in record.losses.items() if series}
    if not columns:
        return None
    names = sorted(columns, key=lambda name: name != "loss")
    figure, axes = panels(len(names))
    for place, (name, axis) in enumerate(zip(names, axes, strict=True)):
        draw(
            axis,
            columns[name],
            color=PALETTE[0] if name == "loss" else PALETTE[1 + place % (len(PALETTE) - 1)],
        )
        axis.set_title(drawable(pretty(name), 36))
        fit_axes(axis, [columns[name]])
    return Plot(
        "losses",
        "Loss and its parts",
        figure,
        " ".join(_story(name, columns[name]) for name in names),
        "Means over each epoch's batches.",
        wide=len(names) > 1,
    )


def metrics(record: Record) -> Plot | None:
    """A panel for each evaluation, with its chance level and the numbers to compare with."""
    columns = {name: series for name, series in record.metrics.items() if series}
    if not columns:
        return None
    groups: dict[str, list[str]] = {}
    for name in columns:
        stem = (split_topk(name) or (name,))[0]
        groups.setdefault(stem, []).append(name)
    figure, axes = panels(len(groups), height=3.4)
    for (stem, names), axis in zip(groups.items(), axes, strict=True):
        _metric_panel(axis, record, stem, names, columns)
    alt = " ".join(_story(name, columns[name]) for name in columns)
    return Plot("metrics", "Evaluations", figure, alt, "", wide=len(groups) > 1)


def _metric_panel(axis: Axes, record: Record, stem: str, names: Sequence[str], columns: dict[str, Series]) -> None:
    handles: list[Line2D] = []
    labels: list[str] = []
    chances = {name: record.chance(name) for name in names}
    references: dict[str, list[float]] = {}
    for place, name in enumerate(names):
        color = PALETTE[place % len(PALETTE)]
        handles.append(draw(axis, columns[name], color=color))
        labels.append(f"{_short(name, stem)} {shown(float(columns[name].finite[-1]))}")
        if (chance := chances[name]) is not None:
            axis.axhline(chance, color=color if len(names) > 1 else MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
        for label, value in record.references(name):
            axis.axhline(value, color=color, linestyle=":", linewidth=1.4, alpha=0.9)
            references.setdefault(label, []).append(value)
    known = [chance for chance in chances.values() if chance is not None]
    if known:
        handles.append(Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0))
        labels.append(f"chance {', '.join(map(plain, known))}")
    for label, values in references.items():
        handles.append(Line2D([], [], color=MUTED, linestyle=":", linewidth=1.4))
        labels.append(f"{label} {', '.join(map(plain, values))}")
    axis.set_title(drawable(pretty(stem), 36))
    lines = [value for values in references.values() for value in values]
    everything = [*known, *lines, *(value for name in names for value in columns[name].finite)]
    shares = are_shares(everything) and not any(map(lower_is_better, names))  # an error below 1 is no share of anything
    fit_axes(axis, [columns[name] for name in names], shares=shares)
    legend_below(axis, handles, labels, columns=2 if max(map(len, labels)) < 17 else 1)


def _short(name: str, stem: str) -> str:
    found = split_topk(name)
    return f"top-{found[1]}" if found else pretty(stem)


def pace(record: Record) -> Plot | None:
    """The learning rate and the speed of training."""
    columns = {name: series for name, series in record.pace.items() if series}
    if not columns:
        return None
    figure, axes = panels(len(columns), height=3.4, width=5.6)
    for name, axis, color in zip(columns, axes, (PALETTE[6], PALETTE[7]), strict=False):
        draw(axis, columns[name], color=color)
        fit_axes(axis, [columns[name]], from_zero=True)
        axis.set_title(PACE[name])
    alt = " ".join(_story(PACE[name], series) for name, series in columns.items())
    return Plot("pace", "Learning rate and speed", figure, alt)


def statistic(record: Record, name: str) -> Plot | None:
    """A part of the loss between the value it has when all is well and the one it has after a collapse."""
    series = record.losses.get(name) or record.metrics.get(name)
    floor, collapse = record.bound("floor", name), record.bound("collapse", name)
    if not series or (floor is None and collapse is None):
        return None
    figure, (axis,) = panels(1)
    draw(axis, series, color=PALETTE[0])
    axis.set_title(drawable(pretty(name), 36))
    fit_axes(axis, [series])
    bounds = [value for value in (floor, collapse) if value is not None]
    everything = np.array([*bounds, *series.finite])
    low, high = everything.min(), everything.max()
    if low > 0 and high > 5 * low:
        spread = (high / low) ** 0.12
        axis.set_ylim(low / spread, high * spread)
        logarithmic(axis)
    else:
        spread = 0.12 * (high - low or 1.0)
        axis.set_yscale("linear")
        axis.set_ylim(low - spread, high + spread)
    alt = _story(name, series)
    for label, value, color, above in (("floor", floor, PALETTE[2], False), ("collapse", collapse, PALETTE[1], True)):
        if value is None:
            continue
        alt += f" Its {label} line is at {plain(value)}."
        axis.axhline(value, color=color, linestyle="--", linewidth=1.4)
        axis.annotate(
            f"{label} {plain(value)}",
            (0.99, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            color=color,
            xytext=(0, 4 if above else -4),
            textcoords="offset points",
            va="bottom" if above else "top",
            fontsize=8.5,
            fontweight="bold",
            path_effects=HALO,
        )
    caption = "At the floor the embeddings are distributed as wanted; at the collapse line they are all the same."
    return Plot(f"statistic_{name}", f"{pretty(name)} between its bounds", figure, alt, caption)


def bars(record: Record) -> Plot | None:
    """Final accuracies as bars, with chance and references marked on them."""
    k_of = {name: found[1] for name in record.final if (found := split_topk(name))}
    final = {name: record.final[name] for name in k_of if 0 <= record.final[name] <= 1}
    if not final:
        return None
    figure, (axis,) = panels(1)
    figure.set_size_inches(5.6, 1.5 + 0.34 * len(final))
    ks = sorted({k_of[name] for name in final})
    colors = dict(zip(ks, (PALETTE[0], PALETTE[5], *PALETTE[1:5], *PALETTE[6:]), strict=False))
    marked: dict[str, str] = {}
    for row, (name, value) in enumerate(final.items()):
        axis.barh(row, value, color=colors.get(k_of[name], MUTED), height=0.66)
        axis.annotate(shown(value), (1.02, row), va="center", fontsize=8.5, fontweight="bold", annotation_clip=False)
        chance = record.chance(name)
        if chance is not None:
            axis.plot([chance, chance], [row - 0.4, row + 0.4], color=INK, linestyle=(0, (2, 1.2)), linewidth=1.6)
        for label, reference in record.references(name):
            marker = marked.setdefault(label, "Dsv^P*"[len(marked) % 6])
            axis.plot(reference, row, marker, color=PALETTE[1], markeredgecolor="white", markersize=7.5)
    axis.set_yticks(range(len(final)), [drawable(pretty(name), 28) for name in final])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="")
    axis.grid(axis="y", visible=False)
    axis.set_xticks(np.linspace(0, 1, 6))
    handles: list[Line2D | Patch] = [Patch(color=colors[k]) for k in ks if k in colors]
    labels = [f"top-{k}" for k in ks if k in colors]
    if any(record.chance(name) is not None for name in final):
        handles.append(Line2D([], [], color=INK, linestyle=(0, (2, 1.2)), linewidth=1.6))
        labels.append("chance")
    for label, marker in marked.items():
        handles.append(
            Line2D([], [], color=PALETTE[1], marker=marker, linestyle="", markeredgecolor="white", markersize=7.5)
        )
        labels.append(drawable(label, 24))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    alt = "Final accuracies: " + ", ".join(f"{pretty(name)} {shown(value)}" for name, value in final.items()) + "."
    return Plot("accuracies", "Final accuracy", figure, alt, "The last evaluation, not the best one.")


def _story(name: str, series: Series) -> str:
    """A curve in a sentence, for those who cannot see it."""
    values, epochs = series.finite, series.epochs[np.isfinite(series.values)]
    if len(values) == 1:
        return f"{pretty(name)}: {shown(float(values[0]))} at epoch {epochs[0]:g}."
    return (
        f"{pretty(name)}: from {shown(float(values[0]))} at epoch {epochs[0]:g} "
        f"to {shown(float(values[-1]))} at epoch {epochs[-1]:g}."
    )
