"""The metric that a fit watches: which epoch is the best one, and when to stop."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from vitkit.errors import UsageError
from vitkit.training.epoch import Epoch
from vitkit.validation import at_least

Mode = Literal["max", "min"]


class Monitor:
    """Compares a metric over epochs; `best`, `best_epoch` and `stale` in the loop's `progress` are its state.

    `mode` None takes the direction of the metric's protocol, or "max" for a number without one. `agree(value)` gives every rank the same
    value.
    """

    def __init__(
        self, metric: str, mode: Mode | None, patience: int | None, progress: dict[str, Any], agree: Callable[[float], float]
    ) -> None:
        self.metric, self.patience = metric, patience
        self._mode, self._progress, self._agree = mode, progress, agree

    def is_best(self, epoch: Epoch, protocols: Mapping[str, Mapping[str, Any]]) -> bool:
        """True if this epoch's value is better than all before; a value that is not finite is never better.

        Raises `UsageError` for a metric that was not logged or was measured on another split than val, and for a `mode` that
        contradicts the metric's direction.
        """
        if self.metric not in epoch.logged:
            raise UsageError(f"monitor={self.metric!r} was not logged; logged: {', '.join(epoch.logged)}")
        mode = self._direction(protocols.get(self.metric))
        value, best = self._agree(epoch.logged[self.metric]), self._progress["best"]
        better = best is None or (value > best if mode == "max" else value < best)
        if better and math.isfinite(value):
            self._progress |= {"best": value, "best_epoch": epoch.number, "stale": 0}
            return True
        self._progress["stale"] += 1
        return False

    def reason_to_stop(self) -> str | None:
        """A sentence if the metric has not improved for `patience` evaluations."""
        best = self._progress["best"]
        if self.patience is None or self._progress["stale"] < self.patience:
            return None
        reached = "was not finite" if best is None else f"has not improved on {best:.4f} of epoch {self._progress['best_epoch']}"
        return f"stopping early: {self.metric} {reached} for {self.patience} evaluations"

    def _direction(self, protocol: Mapping[str, Any] | None) -> Mode:
        if protocol is None:
            return self._mode or "max"
        if protocol["split"] != "val":
            raise UsageError(
                f"monitor={self.metric!r} was measured on the {protocol['split']} split; select on the validation split: "
                f"epoch.evaluate(model, data, ..., split='val') and monitor='val_...'"
            )
        direction: Mode = protocol.get("direction", "max")
        if self._mode not in (None, direction):
            raise UsageError(f"mode is {self._mode!r}, but {self.metric!r} is better at its {direction}; leave mode out")
        return direction


def check_monitor(metric: str | None, mode: str | None, patience: int | None) -> None:
    """Raise `UsageError` for arguments out of range."""
    if mode not in ("max", "min", None):
        raise UsageError(f"mode is {mode!r}; expected 'max', 'min' or None (the direction of the metric)")
    if patience is not None and metric is None:
        raise UsageError("patience needs monitor='METRIC', the metric to watch")
    at_least(1, patience=patience)


__all__ = ["Mode", "Monitor", "check_monitor"]
