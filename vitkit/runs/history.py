"""What a run has measured: rows of losses and metrics, how they were measured, pictures of them, and the time it took."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitkit.contracts import ReportFigure, Scores
from vitkit.runs.summary import best_of, write_csv


class History:
    """A row of losses an epoch, a row of metrics an evaluated epoch, and what came with the scores; earlier sittings included."""

    def __init__(self) -> None:
        self.losses: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self.protocols: dict[str, dict[str, Any]] = {}
        self.references: dict[str, dict[str, float]] = {}
        self.figures: dict[str, ReportFigure] = {}
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        self._started = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier sittings included."""
        return self._earlier_seconds + time.monotonic() - self._began

    def add_losses(self, row: dict[str, Any]) -> None:
        """An epoch's row; rows of later epochs, which a stop has left behind, go."""
        self.losses = [*(old for old in self.losses if old["epoch"] < row["epoch"]), row]

    def add_metrics(self, row: dict[str, Any]) -> None:
        """An evaluated epoch's row, likewise."""
        self.metrics = [*(old for old in self.metrics if old["epoch"] < row["epoch"]), row]

    def add_scores(self, scores: Scores) -> None:
        """The protocols and pictures that came with scores."""
        self.protocols |= {name: asdict(protocol) for name, protocol in scores.protocols.items()}
        self.figures |= scores.figures

    def write_losses(self, directory: Path) -> None:
        """Write `losses.csv`."""
        write_csv(directory / "losses.csv", self.losses)

    def write_metrics(self, directory: Path) -> None:
        """Write `metrics.csv`."""
        write_csv(directory / "metrics.csv", self.metrics)

    def to_keep(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "losses": self.losses, "metrics": self.metrics, "protocols": self.protocols, "seconds": self.seconds,
            "started": self._started,
        }  # fmt: skip

    def restore(self, kept: Mapping[str, Any], epochs: int) -> None:
        """Take back what a checkpoint kept; rows of epochs that will be trained again are dropped."""
        self.losses = [row for row in kept["losses"] if row["epoch"] <= epochs]
        self.metrics = [row for row in kept["metrics"] if row["epoch"] <= epochs]
        self.protocols = dict(kept["protocols"])
        self._earlier_seconds, self._started = kept["seconds"], kept["started"]

    def summary(self) -> dict[str, Any]:
        """Its part of `summary.json`."""
        last = self.metrics[-1] if self.metrics else {}
        return {
            "final": {name: value for name, value in last.items() if name not in ("epoch", "step")},
            "best": best_of(self.metrics),
            "protocols": self.protocols,
            "references": self.references,
            "epochs": self.losses[-1]["epoch"] if self.losses else 0,
            "seconds": round(self.seconds, 2),
            "images_per_second": self.losses[-1]["images_per_second"] if self.losses else 0.0,
            "started": self._started,
        }

    def closing_line(self) -> str:
        """How long it took, and what was reached."""
        last = self.metrics[-1] if self.metrics else self.losses[-1]
        shown = ", ".join(f"{k} {v:.4f}" for k, v in last.items() if isinstance(v, float) and k not in ("lr", "seconds"))
        return f"done in {self.seconds:.0f} s: {shown}"


__all__ = ["History"]
