"""The tables of a run as figures: losses, metrics and statistics over epochs, and final proportions as bars."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vitkit.report.formatting import format_constant, format_number, split_topk, title_of
from vitkit.report.record import Record, Series, base_name
from vitkit.report.style import HALO, INK, MUTED, PALETTE, Plot, drawable, legend_below, panels

PACE = {"lr": "learning rate", "images_per_second": "images/s"}
SPLITS = {"train": "training", "val": "validation", "test": "test"}
SPLIT_COLORS = {"test": PALETTE[0], "val": PALETTE[5], "train": PALETTE[7]}
BOUNDS = {"floor": PALETTE[2], "collapse": PALETTE[1], "uninformed": MUTED}
MEANINGS = {
    "floor": "the value if the embeddings have the wanted distribution",
    "collapse": "the value if all embeddings are equal",
    "uninformed": "the value of a prediction that uses no information about its input",
}
CHANCE, UNTRAINED = (0, (4, 3)), (0, (1, 1.5, 4, 1.5))
LOG_SCALE_RATIO = 10.0
"""An axis is logarithmic if its largest value is more than this many times its smallest one."""
MAX_BARS = 24


def draw(axes: Axes, series: Series, *, color: str, linestyle: str = "-") -> Line2D:
    """Draw one column over epochs, with markers if a line alone would hide points."""
    lonely = len(series.values) <= 15 or not np.isfinite(series.values).all()
    marker, face = "o" if lonely else None, color if linestyle == "-" else "white"
    (line,) = axes.plot(series.epochs, series.values, color=color, linestyle=linestyle, marker=marker, markerfacecolor=face)
    return line


def fit_axes(
    axes: Axes, columns: Iterable[Series], lines: Sequence[float] = (), *, proportions: bool = False, from_zero: bool = False
) -> None:
    """Set limits and scale: [0, 1] for proportions, from 0 if asked, else logarithmic for values that span decades."""
    columns = list(columns)
    epochs = np.concatenate([series.epochs for series in columns])
    if epochs.min() == epochs.max():
        axes.set_xlim(epochs.min() - 1, epochs.max() + 1)
    values = np.concatenate([*(series.finite for series in columns), lines])
    if proportions:
        axes.set_ylim(-0.02, 1.04)
    elif from_zero:
        axes.set_ylim(min(0.0, values.min(initial=0.0)), 1.08 * values.max(initial=0.0) or 1.0)
    elif len(values) and values.min() > 0 and values.max() > LOG_SCALE_RATIO * values.min():
        logarithmic(axes)


def logarithmic(axes: Axes) -> None:
    """Make the axis logarithmic, with plain numbers on it."""
    axes.set_yscale("log")
    decades = np.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def losses(record: Record) -> Plot | None:
    """A panel for the loss and one for each of its parts, with the floor, collapse and uninformed values that are recorded."""
    columns = {name: series for name, series in record.losses.items() if series}
    if not columns:
        return None
    names = sorted(columns, key=lambda name: name != "loss")
    figure, axes = panels(len(names))
    alts: list[str] = []
    used: set[str] = set()
    for place, (name, axis) in enumerate(zip(names, axes, strict=True)):
        draw(axis, columns[name], color=PALETTE[0] if name == "loss" else PALETTE[1 + place % (len(PALETTE) - 1)])
        axis.set_title(drawable(title_of(name), 36))
        bounds = {label: value for label in BOUNDS if (value := record.bound(label, name)) is not None}
        for label, value in bounds.items():
            axis.axhline(value, color=BOUNDS[label], linestyle="--", linewidth=1.4)
            axis.annotate(
                f"{label} {format_constant(value)}", (0.99, value), xycoords=("axes fraction", "data"), ha="right",
                xytext=(0, -4 if label == "floor" else 4), textcoords="offset points", va="top" if label == "floor" else "bottom",
                color=BOUNDS[label], fontsize=8.0, fontweight="bold", path_effects=HALO,
            )  # fmt: skip
        axis.margins(y=0.14 if bounds else 0.05)
        fit_axes(axis, [columns[name]], list(bounds.values()))
        used |= bounds.keys()
        alts.append(_description(name, columns[name]))
        alts += [f"Its {label} line is at {format_constant(value)}." for label, value in bounds.items()]
    meanings = [f"{label}: {MEANINGS[label]}." for label in BOUNDS if label in used]
    caption = " ".join(["Means over each epoch's batches.", *meanings])
    return Plot("losses", "Loss and its parts", figure, " ".join(alts), caption, wide=len(names) > 1)


def metrics(record: Record) -> Plot | None:
    """A panel for each metric: validation and test values, chance, the untrained network, and references."""
    columns = {name: series for name, series in record.metrics.items() if series}
    if not columns:
        return None
    groups: dict[str, list[str]] = {}
    for name in columns:
        groups.setdefault((split_topk(base_name(name)) or (base_name(name),))[0], []).append(name)
    figure, axes = panels(len(groups), height=3.4)
    for (stem, names), axis in zip(groups.items(), axes, strict=True):
        _metric_panel(axis, record, stem, names, columns)
    alt = " ".join(_description(name, columns[name]) for name in columns)
    splits = {record.split(name) for name in columns}
    caption = "Solid: test split. Dash-dotted: validation split, the one to select by." if "val" in splits else ""
    return Plot("metrics", "Evaluations", figure, alt, caption, wide=len(groups) > 1)


def _metric_panel(axis: Axes, record: Record, stem: str, names: Sequence[str], columns: Mapping[str, Series]) -> None:
    handles: list[Line2D] = []
    labels: list[str] = []
    constants: dict[tuple[str, Any], list[float]] = {}
    bases = list(dict.fromkeys(base_name(name) for name in names))
    for name in sorted(names, key=lambda name: bases.index(base_name(name))):
        color = PALETTE[bases.index(base_name(name)) % len(PALETTE)]
        handles.append(draw(axis, columns[name], color=color, linestyle="-." if record.split(name) == "val" else "-"))
        topk = split_topk(name)
        words = (f"top-{topk[1]}" if topk else "", SPLITS.get(record.split(name), record.split(name)))
        label = " ".join(word for word in words if word) or title_of(stem)
        labels.append(f"{label} {format_number(columns[name].last)}")
        lines: list[tuple[str, Any, float | None]] = [(label, "--", record.bound(label, name)) for label in BOUNDS]
        lines += [("chance", CHANCE, record.chance(name)), ("untrained", UNTRAINED, record.untrained(name))]
        for word, style, value in (*lines, *((word, ":", value) for word, value in record.references(name))):
            values = constants.setdefault((word, style), [])
            if value is not None and value not in values:
                axis.axhline(value, color=color if len(bases) > 1 else MUTED, linestyle=style, linewidth=1.2)
                values.append(value)
    for (word, style), values in constants.items():
        if values:
            handles.append(Line2D([], [], color=MUTED, linestyle=style, linewidth=1.2))
            labels.append(f"{word} {', '.join(map(format_constant, values))}")
    unit = record.unit(names[0])
    axis.set_title(drawable(title_of(stem) + (f" ({unit})" if unit else ""), 36))
    everything = [value for values in constants.values() for value in values]
    fit_axes(axis, [columns[name] for name in names], everything, proportions=all(map(record.is_proportion, names)))
    legend_below(axis, handles, labels, columns=2 if max(map(len, labels)) < 20 else 1)


def pace(record: Record) -> Plot | None:
    """The learning rate and the speed of training."""
    columns = {name: series for name, series in record.pace.items() if series}
    if not columns:
        return None
    figure, axes = panels(len(columns))
    for name, axis, color in zip(columns, axes, (PALETTE[6], PALETTE[7]), strict=False):
        draw(axis, columns[name], color=color)
        fit_axes(axis, [columns[name]], from_zero=True)
        axis.set_title(PACE[name])
    alt = " ".join(_description(PACE[name], series) for name, series in columns.items())
    return Plot("pace", "Learning rate and speed", figure, alt, wide=len(columns) > 1)


def bars(record: Record) -> Plot | None:
    """Final proportions as bars, with chance, the untrained network and results to compare with marked on them."""
    final = {name: value for name, value in record.final.items() if record.is_proportion(name) and 0 <= value <= 1}
    final = dict(sorted(final.items(), key=lambda item: list(map(base_name, final)).index(base_name(item[0])))[:MAX_BARS])
    if not final:
        return None
    figure, (axis,) = panels(1)
    figure.set_size_inches(5.6, 1.5 + 0.34 * len(final))
    colors = {record.split(name): SPLIT_COLORS.get(record.split(name), PALETTE[2]) for name in final}
    legend: dict[str, Line2D | Patch] = {
        drawable(SPLITS.get(split, split)) or "last value": Patch(color=color) for split, color in colors.items()
    }
    marks: dict[str, str] = {}
    for row, (name, value) in enumerate(final.items()):
        color = colors[record.split(name)]
        axis.barh(row, value, color=color, height=0.66)
        axis.annotate(format_number(value), (1.02, row), va="center", fontsize=8.5, fontweight="bold", annotation_clip=False)
        ticks: list[tuple[str, Any, float | None]] = [("chance", (0, (2, 1.2)), record.chance(name))]
        for label, style, constant in (*ticks, ("untrained", "-", record.untrained(name))):
            if constant is not None:
                axis.plot([constant] * 2, [row - 0.4, row + 0.4], color=INK, linestyle=style, linewidth=1.6)
                legend.setdefault(label, Line2D([], [], color=INK, linestyle=style, linewidth=1.6))
        for label, reference in record.references(name):
            marker = marks.setdefault(label, "Dsv^P*"[len(marks) % 6])
            look: dict[str, Any] = {"color": PALETTE[1], "marker": marker, "linestyle": "", "markeredgecolor": "white", "markersize": 7.5}
            axis.plot(reference, row, **look)
            legend.setdefault(drawable(label, 24), Line2D([], [], **look))
    axis.set_yticks(range(len(final)), [drawable(title_of(base_name(name)), 28) for name in final])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="")
    axis.grid(axis="y", visible=False)
    axis.set_xticks(np.linspace(0, 1, 6))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 4))
    alt = "Final accuracies: " + ", ".join(f"{title_of(name)} {format_number(value)}" for name, value in final.items()) + "."
    return Plot("accuracies", "Final accuracy", figure, alt, "The last evaluation, not the best one.")


def _description(name: str, series: Series) -> str:
    """A curve in one sentence, for people who cannot see it."""
    values, epochs = series.finite, series.epochs[np.isfinite(series.values)]
    if len(values) == 1:
        return f"{title_of(name)}: {format_number(float(values[0]))} at epoch {epochs[0]:g}."
    return (
        f"{title_of(name)}: from {format_number(float(values[0]))} at epoch {epochs[0]:g} "
        f"to {format_number(float(values[-1]))} at epoch {epochs[-1]:g}."
    )
