"""The training loop, as a generator of epochs.

Every step seeds torch's generators from (seed, step, rank), and batches come from (seed, epoch, index), so a run
that goes on from a checkpoint needs no saved random state to give what an undisturbed run gives.
"""

import contextlib
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vitkit.contracts import Batches, Evaluator, Scores, SplitName
from vitkit.distributed.collectives import AnyRank, all_reduce_sum, broadcast
from vitkit.distributed.fsdp import clone_for_sharding, full_tensor, local
from vitkit.errors import RunError, UsageError
from vitkit.models.features import feature_cache
from vitkit.runs.directory import BEST, LAST
from vitkit.seeding import derive_seed
from vitkit.training.checkpoint import load_state, save_state
from vitkit.training.compile import compile_for
from vitkit.training.ema import ModelEma
from vitkit.training.gradcache import Accumulated, GradCacheable
from vitkit.training.signals import Interrupted, Signals
from vitkit.validation import at_least

if TYPE_CHECKING:
    from vitkit.training.run import Run

CHECKPOINT_SECONDS = 300.0
"""How much work a kill may cost at most, besides the checkpoint at the end of every epoch."""
LOOK_SECONDS = 0.25
"""How often losses are read back from the device: each reading waits for it."""
TRAIL = 20
"""How many batches before a loss that is not finite, or spikes, are written to the log."""
SPIKE, RECENT = 10.0, 100
"""A spike: a loss so many standard deviations (1.48 times the median deviation) above the median of so many before it."""


class Epoch:
    """One epoch that has been trained: `number` counts from 1, `losses` are its mean loss and parts."""

    def __init__(self, run: "Run", number: int, epochs: int, step: int, losses: dict[str, float]) -> None:
        self.run, self.number, self.epochs, self.step, self.losses = run, number, epochs, step, losses
        self.logged: dict[str, float] = {}

    def due(self, every: int) -> bool:
        """Whether to evaluate now: every so many epochs, and after the last. `UsageError` below 1."""
        at_least(1, eval_every=every)
        return self.number % every == 0 or self.number == self.epochs

    def log(self, *scores: Mapping[str, float], **values: float) -> None:
        """Write metrics into this epoch's row of `metrics.csv`; `Scores` bring their protocols and pictures along."""
        for score in scores:
            self.logged |= {name: float(value) for name, value in score.items()}
            if isinstance(score, Scores):
                self.run.history.add_scores(score)
        self.logged |= {name: float(value) for name, value in values.items()}
        self.run.log_metrics(self)

    def evaluate(self, model: nn.Module, data: Any, *evaluators: Evaluator, split: SplitName = "test") -> Scores:
        """Call evaluators on a split of `data`, log their scores and return them joined.

        They compute in the run's precision, and features of the same images are computed once for all of them.
        """
        scores = Scores()
        with self.run.autocast(), feature_cache():
            for evaluator in evaluators:
                scores |= evaluator(model, data) if split == "test" else evaluator(model, data, split=split)
        self.log(scores)
        return scores


def check_arguments(
    *, optimizer: Optimizer, clip: float | None, ema: float | None, monitor: str | None, mode: str, patience: int | None
) -> None:
    """`UsageError` for an argument of `Run.fit` that is out of range; what `Run.steps` asks for aside."""
    if clip is not None and not clip > 0:
        raise UsageError(f"clip is {clip}; expected a positive gradient norm, or None")
    if ema is not None and not 0.0 < ema < 1.0:
        raise UsageError(f"ema is {ema}; expected a decay between 0 and 1, or None")
    if mode not in ("max", "min"):
        raise UsageError(f"mode is {mode!r}; expected 'max' or 'min', the better of the monitored metric")
    if patience is not None and monitor is None:
        raise UsageError("patience needs monitor='METRIC', the metric to watch")
    if patience is not None:
        at_least(1, patience=patience)
    for group in optimizer.param_groups:
        if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
            raise UsageError(f"lr is {group['lr']}; expected a finite learning rate of at least 0")


class Fit:
    """What `Run.fit` iterates over; its arguments are documented and checked there."""

    def __init__(
        self,
        run: "Run",
        model: nn.Module,
        batches: Any,
        *,
        epochs: int,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        clip: float | None,
        ema: float | None,
        monitor: str | None,
        mode: Literal["max", "min"],
        patience: int | None,
    ) -> None:
        self.run, self.epochs, self.clip = run, epochs, clip
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.batches: Batches = batches if hasattr(batches, "epoch") else _Loader(batches)
        self.module, self.cached = model, run.grad_accum > 1 and isinstance(model, GradCacheable)
        # What is sharded over ranks can be called as a whole alone: evaluators and the recipe keep a model of their own.
        self.trained = clone_for_sharding(model.to(run.device), optimizer) if run.sharded else model
        if run.sharded or self.cached:  # what a model compiles is its forward pass as a whole
            why = "its weights are sharded" if run.sharded else "--grad-accum calls this model's embed and compute_loss"
            said = f"not compiled: {why}" if run.compile == "on" else ""
        else:
            said = compile_for(model, run.compile, device=run.device.type, steps=run.steps(self.batches, epochs))
        if said:
            run.say(said)
        wrapped = Accumulated(cast(GradCacheable, self.trained)) if self.cached else self.trained
        self.model, self.optimizer = run.accelerator.prepare(wrapped, optimizer)
        self.schedule = schedule
        self.average = ModelEma(self.trained, ema) if ema else None
        self.progress: dict[str, Any] = {
            "epoch": 0, "batch": 0, "step": 0, "trained": False, "sums": {}, "count": 0, "images": 0,
            "train_seconds": 0.0, "best": None, "best_epoch": 0, "stale": 0,
        }  # fmt: skip
        self._pending: list[tuple[int, dict[str, Tensor], Tensor | None, float]] = []
        self._trail: deque[str] = deque(maxlen=TRAIL)
        self._any_rank = AnyRank(run.device)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._saved = time.monotonic()
        self._skipped = 0

    def __iter__(self) -> Iterator[Epoch]:
        run, progress = self.run, self.progress
        if run.resuming:
            self._restore()
        with Signals() as signals, run.progress(self.epochs, len(self.batches)):
            while progress["epoch"] < self.epochs:
                if not progress["trained"]:
                    with signals.deferred():
                        self._train(signals)
                    progress["trained"] = True
                    self._tell_skipped()
                    self._checkpoint()
                signals.raise_if_asked()
                count = max(progress["count"], 1)
                losses = {name: total / count for name, total in progress["sums"].items()}
                epoch = Epoch(run, progress["epoch"] + 1, self.epochs, progress["step"], losses)
                run.log_losses(epoch, lr=self.optimizer.param_groups[0]["lr"], fit=progress)
                torch.manual_seed(derive_seed(run.seed, "evaluation", progress["epoch"]))
                with self._averaged():
                    yield epoch
                stop = self._judge(epoch)
                progress |= {"epoch": progress["epoch"] + 1, "batch": 0, "trained": False, "sums": {}, "count": 0}
                if stop:
                    run.say(stop)
                    break
        if self.average is not None or self.trained is not self.module:
            self._show()

    def _train(self, signals: "Signals") -> None:
        """The rest of one epoch."""
        run, progress, accelerator = self.run, self.progress, self.run.accelerator
        self.model.train()
        stream = self.batches.epoch(
            progress["epoch"], seed=run.seed, start=progress["batch"], device=run.device,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        began, looked, images_then = time.monotonic(), time.monotonic(), progress["images"]
        begin_seconds = progress["train_seconds"]
        while group := list(islice(stream, run.grad_accum)):
            found, norm, lr = self._backward(group), None, self.optimizer.param_groups[0]["lr"]
            if self.clip is not None:
                norm = full_tensor(accelerator.clip_grad_norm_(self.model.parameters(), self.clip))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.schedule is not None:
                self.schedule.step()
            if self.average is not None:
                self.average.update(self.trained)
            progress["step"] += 1
            run.begin()
            run.watchdog.moved()
            for index, parts in enumerate(found, start=progress["batch"]):
                self._pending.append((index, {name: value.detach() for name, value in parts.items()}, norm, lr))
            progress["batch"] += len(group)
            progress["images"] += sum(map(_samples, group)) * accelerator.num_processes
            now = time.monotonic()
            progress["train_seconds"] = begin_seconds + now - began
            if now - looked > LOOK_SECONDS or len(self._pending) >= 50:
                self._look()
                rate = (progress["images"] - images_then) / max(now - began, 1e-9)
                looked = time.monotonic()
                run.show(progress, rate)
            # One rank's clock or signal is all ranks': they leave, and gather what is sharded, after the same step.
            asked, due = self._any_rank(signals.asked, now - self._saved > CHECKPOINT_SECONDS)
            if asked or due:
                self._checkpoint()
            if asked:
                raise Interrupted
        self._look()

    def _tell_skipped(self) -> None:
        """One line about images that could not be read, where this epoch met more of them than those before."""
        skipped = getattr(self.batches, "skipped", None)
        if skipped is None:
            return
        count = int(all_reduce_sum(torch.tensor(float(len(skipped)), device=self.run.device)))
        if count > self._skipped:
            shown, more = "; ".join(skipped[:5]), "; ..." if count > 5 else ""
            self.run.say(f"images left out because they cannot be read: {count:,} ({shown}{more})")
        self._skipped = count

    def _backward(self, group: list[Any]) -> list[Mapping[str, Tensor]]:
        """Add up the gradient of a group of batches; the losses and parts of each, or of all where they are one."""
        run, accelerator, first = self.run, self.run.accelerator, self.progress["batch"]
        seeds = [
            derive_seed(run.seed, "step", self.progress["epoch"], index, accelerator.process_index)
            for index in range(first, first + len(group))
        ]
        if self.cached:
            parts = self._forward(group, seeds)
            accelerator.backward(_loss_of(parts))
            return [parts]
        found = []
        for number, (batch, seed, share) in enumerate(zip(group, seeds, self._shares(group), strict=True), start=1):
            torch.manual_seed(seed)
            with contextlib.nullcontext() if number == len(group) else accelerator.no_sync(self.model):
                parts = self._forward(batch)
                accelerator.backward(_loss_of(parts) * share)
            found.append(parts)
        return found

    def _forward(self, *inputs: Any) -> Any:
        if not self.run.sharded:  # accelerate has put the model's forward pass into the run's precision
            return self.model(*inputs)
        with self.run.autocast():
            return self.model(*inputs)

    def _shares(self, group: list[Any]) -> Tensor:
        """What part of the group's samples, over all ranks, each batch has: an epoch's last one may be smaller."""
        counts = torch.tensor([float(_samples(batch)) for batch in group], device=self.run.device)
        counts = all_reduce_sum(counts) if len(group) > 1 else torch.ones_like(counts)
        return counts / counts.sum()

    def _look(self) -> None:
        """Read pending losses back; a value that is not finite stops the run before anything of it is saved."""
        for index, parts, norm, lr in self._pending:
            values = {name: float(value) for name, value in parts.items()}
            length = None if norm is None else float(norm)
            shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            place = f"epoch {self.progress['epoch'] + 1}, batch {index + 1}"
            said = "" if length is None else f", gradient norm {length:.6g}"
            self._trail.append(f"{place}: {shown}{said}, lr {lr:.6g}")
            if not math.isfinite(values["loss"]):
                self._stop(f"the loss is not finite at {place}: {shown}")
            # fp16's first scales are too large on purpose: such a step is left out.
            if length is not None and not math.isfinite(length) and self.run.precision != "fp16":
                self._stop(f"the gradient is not finite at {place}: {shown}{said}")
            self._note_spike(values["loss"], place)
            for name, value in values.items():
                self.progress["sums"][name] = self.progress["sums"].get(name, 0.0) + value
            self.progress["count"] += 1
        self._pending.clear()

    def _note_spike(self, loss: float, place: str) -> None:
        """Into the log goes what led to a finite loss that is far above the last ones; its step is taken like any other."""
        if len(self._recent) >= RECENT // 2:
            middle = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in self._recent)
            if loss - middle > SPIKE * max(spread, 0.01 * abs(middle)):
                led = "\n  ".join(self._trail)
                self.run.note(f"the loss spikes at {place}: {loss:.6g}, the median before it was {middle:.6g}; what led there:\n  {led}")
                self._recent.clear()  # what is usual from here on is found anew
        self._recent.append(loss)

    def _stop(self, what: str) -> None:
        led = "\n  ".join(self._trail)
        self.run.note(f"{what}; the last {len(self._trail)} batches, with the learning rate of their step:\n  {led}")
        last = self.run.directory / LAST
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was saved before"
        raise RunError(
            f"{what}; {good}; what led there is in {self.run.directory / 'log.txt'}; "
            f"try a lower learning rate, a longer warm-up, gradient clipping or --precision fp32"
        )

    def _checkpoint(self, path: Any = LAST) -> None:
        self._look()
        self._saved = time.monotonic()
        # A finite loss may have a gradient that is not.
        finite = [bool(local(parameter.detach()).isfinite().all()) for parameter in self.trained.parameters()]
        if float(all_reduce_sum(torch.tensor(float(not all(finite)), device=self.run.device))):
            self._stop(f"the weights are not finite after step {self.progress['step']}")
        # Sharded states are gathered by all ranks together, for the one that writes them.
        average = self.average.state_dict() if self.average is not None else None
        state, optimizer, average = full_tensor(
            [self.trained.state_dict(), self.optimizer.state_dict(), average], keep=self.run.is_main, device="cpu"
        )
        if not self.run.is_main:
            return
        save_state(
            self.run.directory / path,
            model_state=state,
            optimizer=optimizer,
            ema_state=average,
            scheduler=self.schedule.state_dict() if self.schedule is not None else None,
            progress={"fit": self.progress, "run": self.run.history.to_keep()},
        )

    def _restore(self) -> None:
        path = self.run.directory / LAST
        seen = float(all_reduce_sum(torch.tensor(float(path.exists()), device=self.run.device)))
        if 0 < seen < self.run.accelerator.num_processes:
            raise RunError(
                f"{path} is seen by {seen:.0f} of {self.run.accelerator.num_processes} ranks; to resume on several machines put "
                f"--out on a file system that all of them share"
            )
        if not seen:  # stopped before the first checkpoint: begin again
            self.run.say("no checkpoint yet: starting from the beginning")
            return
        state = load_state(path)
        state.restore(self.trained, self.optimizer, self.average, self.schedule)
        self.progress |= state.progress["fit"]
        self.run.history.restore(state.progress["run"], self.progress["epoch"])
        whole = self.progress["batch"] >= len(self.batches)
        where = "behind its last batch" if whole else f"batch {self.progress['batch'] + 1}"
        self.run.say(f"resuming at epoch {self.progress['epoch'] + 1}, {where}")

    def _judge(self, epoch: Epoch) -> str | None:
        """Keep the best checkpoint of the monitored metric; a sentence where it has not improved for too long."""
        if self.monitor is None or not epoch.logged:
            return None
        if self.monitor not in epoch.logged:
            raise UsageError(f"monitor={self.monitor!r} was not logged; logged: {', '.join(epoch.logged)}")
        value, best = self._agreed(epoch.logged[self.monitor]), self.progress["best"]
        better = best is None or (value > best if self.mode == "max" else value < best)
        if better and math.isfinite(value):  # what is not finite is never best, and no improvement
            self.progress |= {"best": value, "best_epoch": epoch.number, "stale": 0}
            self._checkpoint(BEST)
            return None
        self.progress["stale"] += 1
        if self.patience is not None and self.progress["stale"] >= self.patience:
            reached = "was not finite" if best is None else f"has not improved on {best:.4f} of epoch {self.progress['best_epoch']}"
            return f"stopping early: {self.monitor} {reached} for {self.patience} evaluations"
        return None

    def _agreed(self, value: float) -> float:
        """Rank 0's, for ranks that decide differently would wait for each other; evaluations may differ in the last bit."""
        if self.run.accelerator.num_processes == 1:
            return value
        return float(broadcast(torch.tensor(value, dtype=torch.float64, device=self.run.device)))

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model holds its averaged weights while an epoch is looked at, and its own again afterwards."""
        if self.average is None and self.trained is self.module:
            yield
            return
        kept = self.trained is self.module
        own = {name: value.clone() for name, value in self.module.state_dict().items()} if kept else {}
        self._show()
        yield
        # Reached only when the loop goes on: after a `break` the averaged weights stay, to be saved.
        if kept:
            self.module.load_state_dict(own)

    def _show(self) -> None:
        """Into the model that the recipe knows, put the averaged weights, or else those that are trained."""
        found = self.average.weights() if self.average is not None else self.trained.state_dict()
        self.module.load_state_dict(full_tensor(found))


class _Sized(Protocol):
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class _Loader:
    """Any sized iterable of batches, a torch DataLoader say, as `Batches`.

    It draws from (seed, epoch, index) what it draws from the global generators of torch, Python and NumPy, which are put
    back afterwards; entered in the middle of an epoch it is run up to there, so that it gives what it would have given.
    A DataLoader's workers are seeded by torch from the epoch, which gives the same as long as their number is, and not with
    `persistent_workers`, whose generators run on. Nor is a generator of the loader's own put back: let it be None.
    """

    def __init__(self, loader: _Sized) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        if world > 1:
            raise UsageError("on several devices give run.fit `split.batches(...)`, which divides itself over the ranks")
        with _drawing(derive_seed(seed, "loader", number)):
            batches = iter(self.loader)
        for index in count():
            with _drawing(derive_seed(seed, "loader", number, index)):
                batch = next(batches, None)
            if batch is None:
                return
            if index >= start:
                yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


@contextlib.contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Within it the CPU's global generators draw from `seed`; afterwards they go on where they were."""
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])


def _loss_of(parts: Any) -> Tensor:
    if not isinstance(parts, Mapping) or "loss" not in parts:
        raise UsageError(f"a model given to run.fit returns a dict with 'loss'; got {type(parts).__name__}: {parts!r:.80}")
    loss: Tensor = parts["loss"]
    if loss.ndim != 0:
        raise UsageError(f"'loss' is a scalar; got the shape {tuple(loss.shape)}: reduce it with mean() or sum()")
    return loss


def _samples(batch: Mapping[str, Tensor]) -> int:
    return len(batch["labels"]) if "labels" in batch else len(next(iter(batch.values())))
