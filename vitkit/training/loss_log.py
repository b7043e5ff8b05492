"""The losses of a run while it trains: copied from the device at intervals, checked, and summed for the epoch's row."""

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from vitkit.errors import RunError, UsageError
from vitkit.runs.directory import LAST
from vitkit.runs.history import check_loss_names
from vitkit.training.session import Session

READ_SECONDS = 0.25
"""Seconds between two copies of the losses from the device; each copy waits for the device."""
READ_BATCHES = 50
"""The most batches between two copies of the losses from the device."""
TRAIL_BATCHES = 20
"""Batches before a loss that is not finite, or before a spike, that are written to the log."""
SPIKE_DEVIATIONS, RECENT_BATCHES = 10.0, 100
"""A spike is a loss this many standard deviations (1.48 · the median deviation) above the median of the recent batches."""
UNINFORMED_AFTER_SHARE, UNINFORMED_TOLERANCE = 0.1, 0.02
"""After this share of the steps a loss still within this share of the uninformed value is reported."""


class LossLog:
    """The losses that are still on the device, and those of the latest batches, for messages.

    `progress` is the loop's; `sums` and `count` in it make the epoch's mean losses.
    """

    def __init__(self, session: Session, progress: dict[str, Any]) -> None:
        self._session, self._progress = session, progress
        self._pending: list[tuple[int, Mapping[str, Tensor], Tensor | None, float]] = []
        self._trail: deque[str] = deque(maxlen=TRAIL_BATCHES)
        self._recent: deque[dict[str, float]] = deque(maxlen=RECENT_BATCHES)
        self._uninformed: dict[str, float] = {}
        self._read_at = time.monotonic()

    def add(self, batch: int, parts: Mapping[str, Tensor], norm: Tensor | None, lr: float) -> None:
        """Add the losses of one batch of the current epoch, with its step's gradient norm and learning rate."""
        self._pending.append((batch, {name: value.detach() for name, value in parts.items()}, norm, lr))

    @property
    def due(self) -> bool:
        """True if it is time to copy the losses from the device."""
        return time.monotonic() - self._read_at > READ_SECONDS or len(self._pending) >= READ_BATCHES

    def read(self) -> None:
        """Copy the pending losses from the device, all at once. Raises `RunError` for a value that is not finite."""
        device = self._session.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        scalars = [value for _, parts, norm, _ in self._pending for value in (*parts.values(), norm) if value is not None]
        values = iter(torch.stack([value.reshape(()).to(device, dtype) for value in scalars]).tolist() if scalars else [])
        for batch, parts, norm, lr in self._pending:
            losses = {name: next(values) for name in parts}
            self._check(batch, losses, None if norm is None else next(values), lr)
            for name, value in losses.items():
                self._progress["sums"][name] = self._progress["sums"].get(name, 0.0) + value
            self._progress["count"] += 1
        self._pending.clear()
        self._read_at = time.monotonic()

    def stop(self, reason: str) -> NoReturn:
        """Write the latest batches to the log and raise `RunError`."""
        self._session.note(f"{reason}; the last {len(self._trail)} batches, with the learning rate of their step:", *self._trail)
        directory = self._session.directory
        exists = directory is not None and (directory / LAST).exists()
        last = f"the last good checkpoint is {directory}/{LAST}" if exists else "no checkpoint was saved before"
        raise RunError(
            f"{reason}; {last}; the batches before it are in {directory}/log.txt; "
            f"try a lower learning rate, a longer warm-up, gradient clipping or --precision fp32"
        )

    def set_uninformed(self, values: Mapping[str, float]) -> None:
        """Keep the losses of a prediction that uses no information: the report draws them, and `check_uninformed` compares with them."""
        self._uninformed = {name: float(value) for name, value in values.items()}
        self._session.history.references.setdefault("uninformed", {}).update(self._uninformed)

    def check_uninformed(self, step: int, total: int) -> None:
        """Once, after a tenth of the steps: one line if the loss is still that of a prediction that uses no information."""
        if not self._uninformed or self._progress["uninformed_checked"] or step < UNINFORMED_AFTER_SHARE * total:
            return
        self._progress["uninformed_checked"] = True
        self.read()
        names = ["loss"] if "loss" in self._uninformed else list(self._uninformed)
        now = {name: statistics.median(parts[name] for parts in self._recent if name in parts) for name in names if self._has(name)}
        if now and all(abs(now[name] - self._uninformed[name]) <= UNINFORMED_TOLERANCE * abs(self._uninformed[name]) for name in now):
            values = ", ".join(f"{name} {value:.4f} ({self._uninformed[name]:.4f})" for name, value in now.items())
            self._session.say(
                f"after {step:,} of {total:,} steps the loss is still that of a prediction that uses no information: {values}; check "
                f"the labels, the learning rate and that the loss reaches all weights"
            )

    def _has(self, name: str) -> bool:
        return any(name in parts for parts in self._recent)

    def _check(self, batch: int, losses: dict[str, float], norm: float | None, lr: float) -> None:
        text = ", ".join(f"{name} {value:.6g}" for name, value in losses.items())
        place = f"epoch {self._progress['epoch'] + 1}, batch {batch + 1}"
        norm_text = "" if norm is None else f", gradient norm {norm:.6g}"
        self._trail.append(f"{place}: {text}{norm_text}, lr {lr:.6g}")
        if not math.isfinite(losses["loss"]):
            self.stop(f"the loss is not finite at {place}: {text}")
        # The first scales of fp16 are too large on purpose: such a step is skipped.
        if norm is not None and not math.isfinite(norm) and self._session.precision != "fp16":
            self.stop(f"the gradient is not finite at {place}: {text}{norm_text}")
        self._note_spike(losses["loss"], place)
        self._recent.append(losses)

    def _note_spike(self, loss: float, place: str) -> None:
        """Write the batches before a spike to the log; the run continues."""
        if len(self._recent) < RECENT_BATCHES // 2:
            return
        recent = [parts["loss"] for parts in self._recent]
        middle = statistics.median(recent)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in recent)
        if loss - middle > SPIKE_DEVIATIONS * max(deviation, 0.01 * abs(middle)):
            spike = f"the loss spikes at {place}: {loss:.6g}, the median before it was {middle:.6g}; the batches before it:"
            self._session.note(spike, *self._trail)
            self._recent.clear()  # the next batches set a new level


def check_parts(parts: Any) -> Tensor:
    """The tensor `loss` in the dict that a model returned.

    Raises `UsageError` if the model returned no dict of scalar tensors, or if no gradient can be computed from its `loss`.
    """
    if not isinstance(parts, Mapping) or "loss" not in parts:
        raise UsageError(f"a model given to run.fit returns a dict with 'loss'; got {type(parts).__name__}: {parts!r:.80}")
    check_loss_names(parts)
    for name, value in parts.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"the model returned {name!r} as {type(value).__name__} ({value!r:.40}); expected a scalar tensor, for example "
                f"torch.tensor({value!r:.40})" if isinstance(value, int | float) else
                f"the model returned {name!r} as {type(value).__name__}; expected a scalar tensor, or leave it out"
            )  # fmt: skip
        if value.numel() != 1:
            raise UsageError(f"{name!r} is a scalar; got the shape {tuple(value.shape)}: reduce it with mean() or sum()")
    loss: Tensor = parts["loss"]
    if not loss.requires_grad:
        raise UsageError("'loss' does not depend on a weight that is trained: no gradient can be computed from it")
    return loss


__all__ = ["LossLog", "check_parts"]
