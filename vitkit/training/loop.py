"""The training loop, as a generator of epochs.

Every step seeds torch's generators from (seed, step, rank), and batches depend only on (seed, epoch, index). A run that resumes from
a checkpoint therefore needs no saved random state to give the numbers of an undisturbed run.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from vitkit.contracts import Batches
from vitkit.distributed.collectives import AnyRank, all_reduce_sum, broadcast
from vitkit.distributed.fsdp import clone_for_sharding, full_tensor, local
from vitkit.errors import RunError, UsageError
from vitkit.runs.directory import BEST, LAST
from vitkit.seeding import derive_seed
from vitkit.training.batches import LoaderBatches, check_batch, prefetch, samples_of
from vitkit.training.checkpoint import load_state, save_state
from vitkit.training.compile import compile_for
from vitkit.training.ema import ModelEma
from vitkit.training.epoch import Epoch
from vitkit.training.gradcache import Accumulated, GradCacheable
from vitkit.training.loss_log import LossLog, check_parts
from vitkit.training.monitor import Mode, Monitor
from vitkit.training.processor import precision_note
from vitkit.training.schedules import Schedule
from vitkit.training.session import Session
from vitkit.training.signals import Interrupted, Signals

CHECKPOINT_SECONDS = 300.0
"""Seconds between two checkpoints within an epoch: a killed run loses at most this much work. Every epoch ends with one, too."""


class Fit:
    """The iterable that `Run.fit` returns an iterator of; see there for its arguments.

    `progress` is the state of the loop: it goes into checkpoints.
    """

    def __init__(
        self,
        session: Session,
        model: nn.Module,
        batches: Any,
        *,
        epochs: int,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        clip: float | None = None,
        ema: float | None = None,
        weight_decay: Schedule | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
        patience: int | None = None,
    ) -> None:
        self.session, self.epochs, self.clip = session, epochs, clip
        self.batches: Batches = batches if hasattr(batches, "epoch") else LoaderBatches(batches)
        self.total_steps = session.steps(self.batches, epochs)
        self.module, self.cached = model, session.grad_accum > 1 and isinstance(model, GradCacheable)
        # All ranks have to use sharded weights together, so evaluators and the recipe keep an unsharded model.
        self.trained = clone_for_sharding(model.to(session.device), optimizer) if session.sharded else model
        self._compile()
        wrapped = Accumulated(cast(GradCacheable, self.trained)) if self.cached else self.trained
        self.model, self.optimizer = session.accelerator.prepare(wrapped, optimizer)
        self.schedule, self._weight_decay = schedule, weight_decay
        self._decayed = [number for number, group in enumerate(optimizer.param_groups) if group.get("weight_decay")]
        self._have_set_step: list[Any] = [m for m in self.trained.modules() if callable(getattr(m, "set_step", None))]
        self._have_after_step: list[Any] = [m for m in self.trained.modules() if callable(getattr(m, "after_step", None))]
        self.average = ModelEma(self.trained, ema) if ema else None
        self.progress: dict[str, Any] = {
            "epoch": 0, "batch": 0, "step": 0, "trained": False, "sums": {}, "count": 0, "images": 0,
            "train_seconds": 0.0, "best": None, "best_epoch": 0, "stale": 0, "uninformed_checked": False,
        }  # fmt: skip
        self._losses = LossLog(session, self.progress)
        self._monitor = Monitor(monitor, mode, patience, self.progress, self._from_rank_0) if monitor else None
        self._any_rank = AnyRank()
        self._saved_at = time.monotonic()
        self._skipped, self._first = 0, True

    def __iter__(self) -> Iterator[Epoch]:
        session, progress, signals = self.session, self.progress, Signals()
        if session.resuming:
            self._restore()
        with session.progress(self.epochs, len(self.batches)):
            while progress["epoch"] < self.epochs:
                # The handlers are not active around `yield`: the body of the recipe's loop keeps Python's own Ctrl-C.
                with signals:
                    if not progress["trained"]:
                        with signals.deferred():
                            self._train(signals)
                        progress["trained"] = True
                        self._say_skipped()
                        self._checkpoint(LAST)
                    signals.raise_if_asked()
                epoch = self._make_epoch()
                with self._averaged_weights():
                    yield epoch
                reason = self._judge(epoch)
                progress |= {"epoch": progress["epoch"] + 1, "batch": 0, "trained": False, "sums": {}, "count": 0}
                if reason:
                    session.say(reason)
                    break
        if self.average is not None or self.trained is not self.module:
            self._load_weights()

    def _compile(self) -> None:
        session = self.session
        if session.sharded or self.cached:  # compiling a model compiles its forward pass
            reason = "its weights are sharded" if session.sharded else "--grad-accum calls forward_features and compute_loss"
            text = f"not compiled: {reason}" if session.compile == "on" else ""
        else:
            text = compile_for(self.trained, session.compile, device=session.device.type, steps=self.total_steps)
        for line in (text, precision_note(session.precision, session.device.type)):
            if line:
                session.say(line)

    def _make_epoch(self) -> Epoch:
        """The epoch that has been trained, with its row of losses written."""
        progress, count = self.progress, max(self.progress["count"], 1)
        losses = {name: total / count for name, total in progress["sums"].items()}
        epoch = Epoch(self.session, progress["epoch"] + 1, self.epochs, progress["step"], losses)
        self.session.log_losses(
            {
                "epoch": epoch.number, "step": epoch.step, **losses, "lr": self.optimizer.param_groups[0]["lr"],
                "images_per_second": round(progress["images"] / max(progress["train_seconds"], 1e-9), 1),
            },
            self.epochs,
        )  # fmt: skip
        return epoch

    def _train(self, signals: Signals) -> None:
        """Train the rest of one epoch."""
        session, progress, accelerator = self.session, self.progress, self.session.accelerator
        self.model.train()
        stream: Iterator[Any] = self.batches.epoch(
            progress["epoch"], seed=session.seed, start=progress["batch"], device=session.device,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        # A plain loader draws from the global generators, which the model uses at the same time.
        if session.device.type == "cuda" and not isinstance(self.batches, LoaderBatches):
            stream = prefetch(stream)
        began, images_before, seconds_before = time.monotonic(), progress["images"], progress["train_seconds"]
        while group := list(islice(stream, session.grad_accum)):
            self._step(group)
            progress["images"] += sum(map(samples_of, group)) * accelerator.num_processes
            now = time.monotonic()
            progress["train_seconds"] = seconds_before + now - began
            if self._losses.due:
                self._losses.read()
                session.show(progress, (progress["images"] - images_before) / max(now - began, 1e-9))
            self._losses.check_uninformed(progress["step"], self.total_steps)
            # A clock or signal of one rank counts for all: they stop, and gather sharded weights, after the same step.
            stop, due = self._any_rank(signals.asked, now - self._saved_at > CHECKPOINT_SECONDS)
            if stop or due:
                self._checkpoint(LAST)
            if stop:
                raise Interrupted
        self._losses.read()

    def _step(self, group: list[Any]) -> None:
        """One step of the optimiser on a group of batches."""
        session, progress = self.session, self.progress
        for batch in group:
            check_batch(batch)
        if self._first:
            self._first = False
            self._set_uninformed(group)
        for module in self._have_set_step:
            module.set_step(progress["step"], self.total_steps)
        if self._weight_decay is not None:
            for number in self._decayed:
                self.optimizer.param_groups[number]["weight_decay"] = self._weight_decay(progress["step"], self.total_steps)
        parts, norm, lr = self._backward(group), None, self.optimizer.param_groups[0]["lr"]
        if self.clip is not None:
            norm = full_tensor(session.accelerator.clip_grad_norm_(self.model.parameters(), self.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        for module in self._have_after_step:
            module.after_step(progress["step"], self.total_steps)
        if self.average is not None:
            self.average.update(self.trained)
        for number, losses in enumerate(parts, start=progress["batch"]):
            self._losses.add(number, losses, norm, lr)
        progress["step"] += 1
        progress["batch"] += len(group)
        session.steps_taken = progress["step"]
        session.begin()
        session.watchdog.moved()

    def _backward(self, group: list[Any]) -> list[Mapping[str, Tensor]]:
        """Add up the gradients of a group of batches; returns the losses of each, or of all if the model compares all samples."""
        accelerator, first = self.session.accelerator, self.progress["batch"]
        seeds = [
            derive_seed(self.session.seed, "step", self.progress["epoch"], index, accelerator.process_index)
            for index in range(first, first + len(group))
        ]
        if self.cached:
            parts = self._forward(group, seeds)
            accelerator.backward(check_parts(parts))
            return [parts]
        losses = []
        for number, (batch, seed, share) in enumerate(zip(group, seeds, self._shares(group), strict=True), start=1):
            torch.manual_seed(seed)
            with contextlib.nullcontext() if number == len(group) else accelerator.no_sync(self.model):
                parts = self._forward(batch)
                loss = check_parts(parts)
                accelerator.backward(loss if len(group) == 1 else loss * share)
            losses.append(parts)
        return losses

    def _forward(self, *inputs: Any) -> Any:
        # accelerate has put the forward pass of a model that is not sharded into the run's precision.
        try:
            with self.session.autocast() if self.session.sharded else contextlib.nullcontext():
                return self.model(*inputs)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"batch {self.progress['batch'] + 1} of {len(self.batches)} has one sample, and a batch norm needs two: give "
                f"drop_last=True to the batches, or another batch size"
            ) from None

    def _shares(self, group: list[Any]) -> Sequence[float | Tensor]:
        """The share of the group's samples, over all ranks, that each batch has; the last one of an epoch may be smaller."""
        counts = [float(samples_of(batch)) for batch in group]
        if self.session.accelerator.num_processes == 1 or len(group) == 1:
            return [count / sum(counts) for count in counts]
        local_counts = torch.tensor(counts)
        if self.session.device.type == "cuda":  # a copy from pinned memory does not wait for the device
            local_counts = local_counts.pin_memory()
        total = all_reduce_sum(local_counts.to(self.session.device, non_blocking=True))
        return (total / total.sum()).unbind()

    def _set_uninformed(self, group: list[Any]) -> None:
        """Ask the model for the losses of a prediction that uses no information, for the number of samples that a step compares."""
        uninformed = getattr(self.module, "uninformed", None)
        if callable(uninformed):
            compared = sum(map(samples_of, group)) if self.cached else samples_of(group[0])
            self._losses.set_uninformed(uninformed(compared * self.session.accelerator.num_processes))

    def _say_skipped(self) -> None:
        """Report images that could not be read, if their number has grown in this epoch."""
        skipped = getattr(self.batches, "skipped", None)
        if skipped is None:
            return
        count = int(self._sum(float(len(skipped))))
        if count > self._skipped:
            names, more = "; ".join(skipped[:5]), "; ..." if count > 5 else ""
            self.session.say(f"images left out because they cannot be read: {count:,} ({names}{more})")
        self._skipped = count

    def _checkpoint(self, path: Path) -> None:
        self._losses.read()
        self._saved_at = time.monotonic()
        # A step with a finite loss may still make weights infinite.
        finite = [local(parameter.detach()).isfinite().all() for parameter in self.trained.parameters()]
        if self._sum(float(not bool(torch.stack(finite).all()))):
            self._losses.stop(f"the weights are not finite after step {self.progress['step']}")
        if self.session.directory is None:
            return
        # All ranks gather sharded states together; only rank 0 keeps them.
        average = self.average.state_dict() if self.average is not None else None
        state, optimizer, average = full_tensor(
            [self.trained.state_dict(), self.optimizer.state_dict(), average], keep=self.session.is_main, device="cpu"
        )
        if not self.session.is_main:
            return
        scaler = self.session.accelerator.scaler  # None without fp16
        save_state(
            self.session.directory / path,
            model_state=state,
            optimizer=optimizer,
            ema_state=average,
            scheduler=self.schedule.state_dict() if self.schedule is not None else None,
            progress={
                "fit": self.progress, "run": self.session.history.to_keep(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )  # fmt: skip

    def _restore(self) -> None:
        session = self.session
        path = cast(Path, session.directory) / LAST
        seen = self._sum(float(path.exists()))
        if 0 < seen < session.accelerator.num_processes:
            raise RunError(
                f"{path} is seen by {seen:.0f} of {session.accelerator.num_processes} ranks; to resume on several machines put "
                f"--out on a file system that all of them share"
            )
        if not seen:  # stopped before the first checkpoint
            session.say("no checkpoint yet: starting from the beginning")
            return
        state = load_state(path)
        state.restore(self.trained, self.optimizer, self.average, self.schedule)
        self.progress |= state.progress["fit"]
        session.steps_taken = self.progress["step"]
        session.history.restore(state.progress["run"], self.progress["epoch"])
        if session.accelerator.scaler is not None and state.progress.get("scaler"):
            session.accelerator.scaler.load_state_dict(state.progress["scaler"])
        done = self.progress["batch"] >= len(self.batches)
        where = "after its last batch" if done else f"batch {self.progress['batch'] + 1}"
        session.say(f"resuming at epoch {self.progress['epoch'] + 1}, {where}")

    def _judge(self, epoch: Epoch) -> str | None:
        """Save a checkpoint if the monitored metric is the best so far; returns a sentence if the training must stop."""
        if self._monitor is None or not epoch.logged:
            return None
        if self._monitor.is_best(epoch, self.session.history.protocols):
            self._checkpoint(BEST)
        return self._monitor.reason_to_stop()

    def _sum(self, value: float) -> float:
        """The sum over ranks."""
        if self.session.accelerator.num_processes == 1:
            return value
        return float(all_reduce_sum(torch.tensor(value, device=self.session.device)))

    def _from_rank_0(self, value: float) -> float:
        """Rank 0's value: evaluations may differ in the last bit, and ranks that decide differently would wait for each other."""
        if self.session.accelerator.num_processes == 1:
            return value
        return float(broadcast(torch.tensor(value, dtype=torch.float64, device=self.session.device)))

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Let the model hold its averaged weights during the block, and its trained weights afterwards."""
        if self.average is None and self.trained is self.module:
            yield
            return
        in_place = self.trained is self.module
        trained = {name: value.clone() for name, value in self.module.state_dict().items()} if in_place else {}
        self._load_weights()
        yield
        # After a `break` in the recipe's loop this is not reached: the averaged weights stay in the model, to be saved.
        if in_place:
            self.module.load_state_dict(trained)

    def _load_weights(self) -> None:
        """Load the averaged weights, or the trained ones, into the recipe's model."""
        weights = self.average.weights() if self.average is not None else self.trained.state_dict()
        self.module.load_state_dict(full_tensor(weights))


def check_fit_arguments(
    model: nn.Module,
    *,
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    clip: float | None = None,
    ema: float | None = None,
) -> None:
    """Raise `UsageError` for arguments of `Run.fit` that are out of range, and for torch classes that the loop cannot step."""
    if clip is not None and not clip > 0:
        raise UsageError(f"clip is {clip}; expected a positive gradient norm, or None")
    if ema is not None and not 0.0 < ema < 1.0:
        raise UsageError(f"ema is {ema}; expected a decay between 0 and 1, or None")
    for group in optimizer.param_groups:
        if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
            raise UsageError(f"lr is {group['lr']}; expected a finite learning rate of at least 0")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UsageError(
            f"{type(optimizer).__name__} computes the loss several times a step; run.fit computes it once: take AdamW, Muon or SGD"
        )
    if isinstance(schedule, ReduceLROnPlateau):
        raise UsageError(
            "ReduceLROnPlateau needs a metric; run.fit steps its schedule after each step of the optimiser: leave it out of run.fit, "
            "and call plateau.step(epoch.losses['loss']) in the loop"
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, value in tensors if isinstance(value, UninitializedParameter | UninitializedBuffer)]
    if lazy:
        raise UsageError(
            f"{', '.join(lazy[:3])} of {type(model).__name__} has no shape yet: call the model once with a batch before the optimiser is "
            f"made, or give the layer its sizes"
        )


__all__ = ["Fit", "check_fit_arguments"]
