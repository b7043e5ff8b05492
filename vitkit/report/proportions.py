"""Shares with their intervals: a bar for each name, the lowest share first."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from vitkit.intervals import wilson
from vitkit.report.formatting import title_of
from vitkit.report.sheet import as_array
from vitkit.report.style import INK, MUTED, PALETTE, Plot, class_labels

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from vitkit.contracts import Proportions

MAX_BARS = 40
"""With more names than this the lowest shares are shown."""


def proportions(name: str, given: "Proportions") -> Plot:
    """A bar for each name: its share, its 95 % interval as a line, and its counts; a broken line is the share of all samples."""
    hits, totals = as_array(given.hits).astype(np.int64), as_array(given.totals).astype(np.int64)
    if hits.shape != totals.shape or hits.shape != (len(given.names),) or not len(given.names):
        raise ValueError(f"hits and totals are (k,) for k names; got {hits.shape}, {totals.shape} and {len(given.names)} names")
    shares = np.divide(hits, totals, out=np.full(len(hits), np.nan), where=totals > 0)
    order = np.argsort(np.nan_to_num(shares, nan=2.0), kind="stable")[:MAX_BARS]
    labels = class_labels(given.names, 24)
    figure = Figure(figsize=(7.6, 1.1 + 0.3 * len(order)), layout="constrained")
    axis = figure.add_subplot()
    for place, index in enumerate(order):
        low, high = wilson(int(hits[index]), int(totals[index]))
        if totals[index]:
            axis.barh(place, shares[index], height=0.62, color=PALETTE[5], linewidth=0)
            axis.plot([low, high], [place, place], color=INK, linewidth=1.6, solid_capstyle="butt")
            axis.plot([low, high], [place, place], color=INK, marker="|", linestyle="", markersize=7)
        text = f"{hits[index]:,} of {totals[index]:,}" if totals[index] else "no image"
        axis.text(1.015, place, text, va="center", ha="left", fontsize=8, color=MUTED)
    total = int(totals.sum())
    if total:
        axis.axvline(hits.sum() / total, color=MUTED, linestyle="--", linewidth=1.0, zorder=0)
    axis.set_yticks(range(len(order)), [labels[index] for index in order])
    axis.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6))
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    overall = f"{hits.sum():,} of {total:,} ({hits.sum() / total:.1%})" if total else "no samples"
    cut = f" The {MAX_BARS} lowest of {len(hits)} are shown." if len(hits) > MAX_BARS else ""
    caption = f"All: {overall}, the broken line. A black line is a 95 % interval (Wilson): few samples make it wide.{cut}"
    alt = "; ".join(f"{given.names[index]}: {hits[index]:,} of {totals[index]:,}" for index in order)
    return Plot(name, title_of(name), figure, f"Bars of {len(order)} shares: {alt}.", caption, wide=True)
