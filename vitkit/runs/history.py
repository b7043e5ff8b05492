"""The history of a run: rows of losses and metrics, their protocols and figures, and the time it took."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.errors import UsageError
from vitkit.runs.summary import best_of, write_csv

if TYPE_CHECKING:  # contracts import torch
    from vitkit.contracts import ReportFigure, Scores

RESERVED = ("epoch", "step", "lr", "loss", "seconds", "images_per_second")
"""Columns of `losses.csv` and `metrics.csv` that the runner writes."""


def check_metric_names(names: Iterable[str]) -> None:
    """Raise `UsageError` for a metric whose name is that of a column that the runner writes."""
    for name in names:
        if name in RESERVED:
            raise UsageError(
                f"epoch.log got a metric named {name!r}: vitkit writes a column of that name itself; "
                f"choose another name, such as 'eval_{name}' (reserved: {', '.join(RESERVED)})"
            )


def check_loss_names(names: Iterable[str]) -> None:
    """Raise `UsageError` for a part of the loss whose name is that of a column that the runner writes; `loss` is allowed."""
    for name in names:
        if name in RESERVED and name != "loss":
            raise UsageError(
                f"the model returned a loss part named {name!r}: vitkit writes a column of that name itself; "
                f"choose another name, such as '{name}_loss' (reserved: {', '.join(RESERVED)})"
            )


class History:
    """One row of losses per epoch, one row of metrics per evaluated epoch, and the protocols and figures of the metrics.

    A resumed run continues the history of its earlier sessions.
    """

    def __init__(self) -> None:
        self.losses: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self.protocols: dict[str, dict[str, Any]] = {}
        self.references: dict[str, dict[str, float]] = {}
        self.figures: dict[str, ReportFigure] = {}
        self.untrained: dict[str, float] = {}
        """Values of metrics for the network before training; `add_scores` writes them into the protocols."""
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        self._started = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, earlier sessions included."""
        return self._earlier_seconds + time.monotonic() - self._began

    def add_losses(self, row: dict[str, Any]) -> None:
        """Add an epoch's row; it replaces rows of the same and later epochs, which remain after an interruption."""
        self.losses = [*(old for old in self.losses if old["epoch"] < row["epoch"]), row]

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Add an evaluated epoch's row; it replaces rows of the same and later epochs."""
        self.metrics = [*(old for old in self.metrics if old["epoch"] < row["epoch"]), row]

    def add_scores(self, scores: "Scores") -> None:
        """Keep the protocols and figures that belong to scores."""
        for name, protocol in scores.protocols.items():
            untrained = protocol.untrained if protocol.untrained is not None else self.untrained.get(name)
            self.protocols[name] = asdict(protocol) | {"untrained": untrained}
        self.figures |= scores.figures

    def write_losses(self, directory: Path) -> None:
        """Write `losses.csv`."""
        write_csv(directory / "losses.csv", self.losses)

    def write_metrics(self, directory: Path) -> None:
        """Write `metrics.csv`."""
        write_csv(directory / "metrics.csv", self.metrics)

    def to_keep(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {
            "losses": self.losses, "metrics": self.metrics, "protocols": self.protocols, "seconds": self.seconds,
            "started": self._started,
        }  # fmt: skip

    def restore(self, kept: Mapping[str, Any], epochs: int) -> None:
        """Restore the state of a checkpoint; rows of epochs after `epochs`, which will be trained again, are dropped."""
        self.losses = [row for row in kept["losses"] if row["epoch"] <= epochs]
        self.metrics = [row for row in kept["metrics"] if row["epoch"] <= epochs]
        self.protocols = dict(kept["protocols"])
        self._earlier_seconds, self._started = kept["seconds"], kept["started"]

    def summary(self) -> dict[str, Any]:
        """The history's fields of `summary.json`."""
        last = self.metrics[-1] if self.metrics else {}
        return {
            "final": {name: value for name, value in last.items() if name not in ("epoch", "step")},
            "best": best_of(self.metrics, self.protocols),
            "protocols": self.protocols,
            "references": self.references,
            "epochs": self.losses[-1]["epoch"] if self.losses else 0,
            "seconds": round(self.seconds, 2),
            "images_per_second": self.losses[-1]["images_per_second"] if self.losses else 0.0,
            "started": self._started,
        }

    def closing_line(self) -> str:
        """The time that the run took, and its last values."""
        last = self.metrics[-1] if self.metrics else self.losses[-1]
        values = ", ".join(f"{k} {v:.4f}" for k, v in last.items() if isinstance(v, float) and k not in ("lr", "seconds"))
        return f"done in {self.seconds:.0f} s: {values}"


__all__ = ["RESERVED", "History", "check_loss_names", "check_metric_names"]
