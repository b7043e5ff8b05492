"""A run: a directory, a device and a log, and the loop that trains in between."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.text import Text
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vitkit import data
from vitkit.contracts import ReportFigure
from vitkit.distributed.collectives import broadcast_text
from vitkit.distributed.watchdog import RankWatchdog
from vitkit.errors import LINE_CHARACTERS, RunDirectoryError, UsageError, VitkitError, printable
from vitkit.files import atomic_write, write_json
from vitkit.models import saving
from vitkit.registry import Spec
from vitkit.runs.directory import BEST, MODULES, TRACKERS, Claim, claim, read_summary, trackers_aside
from vitkit.runs.history import History
from vitkit.runs.summary import processor, versions
from vitkit.training.accelerator import make_accelerator, resolve_device, resolve_precision, resolve_trackers, shards
from vitkit.training.checkpoint import load_state
from vitkit.training.dry_run import preview
from vitkit.training.gradcache import GradCache
from vitkit.training.loop import Epoch, Fit, check_arguments
from vitkit.training.progress import Progress
from vitkit.training.recipe import Recipe, plain
from vitkit.validation import at_least


class DryRun(Exception):
    """Raised where training would begin when `dry_run=True`: everything has been resolved and shown."""


class Run:
    """A run directory, a device setup and a log of metrics.

    `out` is the directory (default `runs/<name>/<time>`), `seed` fixes every random choice, `device` is auto, cpu,
    cuda or mps, `precision` is auto, fp32, bf16 or fp16 (auto: bf16 where the hardware computes in it, or what a run
    that is resumed began with), `compile` is auto, on or off, `resume` goes on with the run in `out`, `overwrite` replaces it
    once the first step is taken, `grad_accum` takes the gradient of so many batches together before a step, `report_to` names
    accelerate's trackers beside the CSV files, `dry_run` shows what would be trained and, with `devices`, what so many devices
    would need for it. Nothing is written before the first step, so that what is refused leaves the directory as it was.
    Raises `UsageError` for a setting that this machine cannot give, `RunDirectoryError` for a directory in use.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        *,
        seed: int = 0,
        device: str = "auto",
        precision: str = "auto",
        compile: Literal["auto", "on", "off"] = "auto",
        resume: bool = False,
        overwrite: bool = False,
        grad_accum: int = 1,
        report_to: str | list[str] = "csv",
        dry_run: bool = False,
        devices: int | None = None,
        name: str = "notebook",
        recipe: Recipe | None = None,
        arguments: Mapping[str, Any] | None = None,
        command: str = "",
        console: Console | None = None,
    ) -> None:
        if grad_accum < 1:
            raise UsageError(f"--grad-accum {grad_accum}: expected at least 1")
        if devices is not None and not dry_run:
            raise UsageError(
                f"--devices {devices} says what a run on so many devices needs, and goes with --dry-run; to train on them: "
                f"torchrun --nproc-per-node {devices} -m vitkit run ..."
            )
        if devices is not None and devices < 1:
            raise UsageError(f"--devices {devices}: expected at least 1")
        if not 0 <= seed < 2**63:
            raise UsageError(f"--seed {seed}: expected a whole number from 0 to 2**63 - 1")
        if resume and overwrite:
            raise RunDirectoryError("--resume goes on with a run and --overwrite discards it; give one of the two")
        self.name, self.seed, self.grad_accum, self.dry_run, self.compile = name, seed, grad_accum, dry_run, compile
        self.arguments = {key: plain(value) for key, value in (arguments or {}).items()}
        reports = report_to if isinstance(report_to, str) else ",".join(report_to)
        self._requested = {
            **self.arguments, "seed": seed, "device": device, "precision": precision, "compile": compile,
            "grad_accum": grad_accum, "report_to": reports,
        }  # fmt: skip
        self.command, self.recipe, self.devices = command, recipe, devices
        self.console = console or Console(stderr=True, highlight=False)
        self._trackers = resolve_trackers(reports.split(","))
        kind = resolve_device(device)
        resolve_precision(precision, kind)
        self.directory = Path(out or "runs")
        self._claim: Claim | None = None
        if not dry_run and os.environ.get("RANK", "0") == "0":  # the others are told below; launchers set RANK
            source = recipe.source if recipe else None
            self._claim = claim(Path(out) if out else None, name, recipe=source, resume=resume, overwrite=overwrite)
            self.directory = self._claim.directory
        try:
            self.resuming = resume and not dry_run
            self._earlier = read_summary(self.directory) if resume else {}
            if precision == "auto":
                precision = str(self._earlier.get("settings", {}).get("precision", "auto"))
            self.precision = resolve_precision(precision, kind)
            self.accelerator = make_accelerator(kind, self.precision, self._trackers, self.directory)
        except BaseException:
            if self._claim is not None:
                self._claim.release()
            raise
        self.device: torch.device = self.accelerator.device
        self.sharded = shards(self.accelerator)
        self.is_main = self.accelerator.is_main_process
        self.directory = Path(broadcast_text(str(self.directory), device=self.device))
        self.watchdog = RankWatchdog(self.alarm)
        torch.manual_seed(seed)
        self.history = History()
        self._dataset: dict[str, Any] = {}
        self._datasets: list[Any] = []
        self._classes: list[str] = []
        self._preprocessing: dict[str, Any] = {}
        self._progress: Progress | None = None
        self._fit: dict[str, Any] = {}
        self._parameters = 0
        self._begun = False

    # -- what a recipe calls ------------------------------------------------------------------------------------

    def dataset(self, name: str = "auto", *, default: str, **kwargs: Any) -> Any:
        """The dataset of a recipe: `auto` is `default`, or else the embedded `digits` with a warning.

        A dataset named by hand never falls back. What was really used stands in the summary, the report and the
        saved model. A run that goes on does so with the dataset that it began with. Raises `UnknownNameError`, `DatasetError`
        and, where that dataset is not what it was, `RunDirectoryError`.
        """
        earlier = ({} if self._datasets else self._earlier.get("dataset")) or {}
        earlier = earlier if earlier.get("asked") == name else {}
        wanted = earlier.get("fallback_for")
        if wanted:
            found = data.stand_in(wanted, f"this run began without {wanted} and goes on without it", **kwargs)
        else:  # once `auto` has been had there is no falling back
            found = data.resolve(default if earlier and name == "auto" else name, default=default, **kwargs)
        counts = {"train": len(found.train), "test": len(found.test)}
        if earlier and counts != {split: earlier.get(split) for split in counts}:
            before, now = (" + ".join(f"{of.get(split)} {split}" for split in counts) for of in (earlier, counts))
            raise RunDirectoryError(
                f"the run in {self.directory} began with {before} images of {earlier.get('name')}, and now there are {now} of "
                f"{found.name}; put that dataset back to go on, or start another run with another --out"
            )
        digest = found.digest
        if earlier.get("digest", digest) != digest:
            raise RunDirectoryError(
                f"the run in {self.directory} began with other labels or classes of {found.name} than there are now; put that "
                f"dataset back to resume, or start another run with another --out"
            )
        if found.notice and self.is_main:
            self.console.print("[bold yellow]WARNING[/]", Text(printable(found.notice, LINE_CHARACTERS)), soft_wrap=True)
        self._datasets.append(found)
        if len(self._datasets) > 1:  # a dataset to evaluate on
            return found
        self._dataset = {
            "name": found.name, "asked": name, "fallback_for": found.fallback_for, "notice": found.notice,
            "arguments": {key: plain(value) for key, value in kwargs.items()}, "digest": digest,
            "classes": list(found.classes), **counts,
            "source": found.source, "licence": found.licence, "hub_id": found.hub_id,
        }  # fmt: skip
        return found

    def steps(self, batches: Any, epochs: int = 1) -> int:
        """Optimiser steps in so many epochs, which is what a schedule counts: `grad_accum` batches make one, and so does
        what is left of them at an epoch's end.

        Raises `UsageError` for epochs below 1, `batches` without a length and those of which an epoch has none.
        """
        at_least(1, epochs=epochs)
        try:
            count = len(batches)
        except TypeError:
            raise UsageError("run.fit needs to know how many batches an epoch has: give it something with len()") from None
        if count == 0:
            raise UsageError("an epoch has no batches: the batch size is larger than the training set, or it is empty")
        return epochs * -(-count // self.grad_accum)

    def fit(
        self,
        model: nn.Module,
        batches: Any,
        *,
        epochs: int,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        clip: float | None = None,
        ema: float | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        patience: int | None = None,
    ) -> Iterator[Epoch]:
        """Train, yielding after each epoch; evaluate and `epoch.log(...)` in the loop's body, `break` to stop early.

        `model(batch)` returns a dict with a scalar `loss` and its parts. `batches` is `split.batches(...)` or any
        sized iterable of dicts of tensors. `schedule` is stepped once an optimiser step, `run.steps(batches, epochs)` times
        in all, `clip` bounds the gradient's norm, `ema` is the decay of averaged weights, which the model holds while an epoch
        is yielded and at the end.
        With `monitor` the best checkpoint of that metric is kept, and `patience` evaluations without a better one end
        the loop; a value that is not finite is no better one. The model ends with its last weights: `run.load_best(model)`
        gives it the best ones. An epoch in which the body leaves by `break` is not compared.

        With `grad_accum` k the gradient is that of k batches put together: exactly so where the loss is a mean over
        samples (each batch counts by its samples), and where the model offers `embed(batch)` and `compute_loss(embedded)`,
        see `vitkit.training.gradcache`, for a loss that compares samples. For others it is the mean of the batches' gradients.

        A loss, a clipped gradient's norm or a weight that is not finite stops the run: `RunError` with the step and the
        parts, within 50 batches. The losses, gradient norms and learning rates of the batches before it are written to
        `log.txt`, and the last checkpoint is from before it. No batch is left out, and a finite loss never stops a run: of
        a spike, more than 10 standard deviations above the median of the last 100 batches, `log.txt` has the same account,
        and `clip` bounds its step. On several devices each of them stops.

        Launched for FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`) what is trained is a copy of `model` that is
        sharded over the devices; `model` itself gets its weights, or their average, before an epoch is yielded and at the
        end. Checkpoints hold whole weights, so that a run may go on with another number of devices.

        Raises `UsageError` before the first step for a value out of range, what `steps` refuses, and a second fit of one run.
        """
        if self._fit:
            raise UsageError(
                "this run has trained already, and has one run.fit: its rows, its checkpoint and what --resume goes on from are "
                "of one training; for stages change what is trained in the loop's body, by epoch.number, or give the second "
                "a recipe of its own that starts from vitkit.load(the first one's directory)"
            )
        self.steps(batches, epochs)
        check_arguments(optimizer=optimizer, clip=clip, ema=ema, monitor=monitor, mode=mode, patience=patience)
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._note_data(batches)
        if self.dry_run:
            shown = preview(
                self, model, batches, epochs=epochs, optimizer=optimizer, ema=ema is not None, devices=self.devices
            )
            self.console.print(shown)
            raise DryRun
        fit = Fit(
            self, model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=clip, ema=ema,
            monitor=monitor, mode=mode, patience=patience,
        )  # fmt: skip
        self._fit = fit.progress
        return iter(fit)

    def load_best(self, model: nn.Module) -> int:
        """After the loop, put into the `model` that `fit` was given the weights that scored best in `monitor`, as they were
        evaluated: averaged ones with `ema`. The epoch they are of.

        Without it the model keeps its last weights. Ranks: all of them call it, and see the run's directory. Raises
        `UsageError` where no best checkpoint was kept, or where it is another model's.
        """
        self.accelerator.wait_for_everyone()  # rank 0 may still be writing it
        path = self.directory / BEST
        if not path.exists():
            raise UsageError(
                "no best checkpoint was kept: give run.fit monitor='METRIC', and epoch.log a finite value of it in the loop"
            )
        state = load_state(path)
        try:
            model.load_state_dict(state.evaluated)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise UsageError(f"{path} is another model's: {said:.400}; give load_best the model that run.fit was given") from None
        return int(state.progress["fit"]["best_epoch"])

    def _note_data(self, batches: Any) -> None:
        """Keep the classes and the preprocessing of the data that is trained on, for `save`."""
        preprocessing = getattr(batches, "preprocessing", None)
        if isinstance(preprocessing, data.Preprocessing):
            self._preprocessing = preprocessing.to_json()
        for source in (batches, getattr(batches, "split", None), getattr(batches, "dataset", None)):  # a DataLoader has a dataset
            self._classes = self._classes or list(getattr(source, "classes", ()))

    def save(self, model: nn.Module | None = None, **modules: nn.Module) -> Path:
        """Write `model.safetensors` and `config.json`.

        `model` is the one that was trained: its parts that a registry built are saved under their attributes' names, losses only
        if they have parameters. Or give the modules by name: `run.save(backbone=backbone)`. Classes and preprocessing are those
        of the data that was trained on. Raises `UsageError` if no part was built by a registry.
        """
        if model is not None:
            modules = {**_registered_parts(model), **modules}
        if self._fit and not (self._classes and self._preprocessing):
            self.say("the batches name no classes or no preprocessing: the saved model takes preprocessed images alone")
        self._open()
        if self.is_main:
            saving.save(
                self.directory,
                {name: self.accelerator.unwrap_model(module) for name, module in modules.items()},
                preprocessing=self._preprocessing,
                classes=self._classes or (list(self._datasets[0].classes) if len(self._datasets) == 1 else []),
                arguments=self.arguments,
                extra={
                    "recipe": self.name, "dataset": self._dataset.get("name"), "seed": self.seed,
                    "data": {key: self._dataset[key] for key in ("asked", "arguments", "digest") if key in self._dataset},
                },
            )  # fmt: skip
        return self.directory

    def resolved(self, **arguments: Any) -> None:
        """Arguments as the recipe resolved them: what a preset or the dataset decided, for the record.

        They are shown; what was asked for is kept beside them, and is what `--resume` and `vitkit reproduce` go by.
        """
        self.arguments |= {name: plain(value) for name, value in arguments.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision, for evaluating in it."""
        return self.accelerator.autocast()

    def reference(self, label: str, **lines: float) -> None:
        """Horizontal lines for the report's plots: `run.reference("seed document", linear_top1=0.95)`."""
        self.history.references.setdefault(label, {}).update({name: float(value) for name, value in lines.items()})

    def figure(self, name: str, figure: ReportFigure) -> None:
        """A figure for the report: a confusion matrix, a map of embeddings, an attention sheet, a sheet of images."""
        self.history.figures[name] = figure

    def say(self, text: str) -> None:
        """One line to the terminal and to `log.txt`."""
        if not self.is_main:
            return
        text = printable(text, LINE_CHARACTERS)
        if self._progress is not None:
            self._progress.line(text)
        else:
            self.console.print(text, markup=False, soft_wrap=True)
        self.note(text)

    def note(self, text: str) -> None:
        """One line to `log.txt` alone."""
        if self._claim is not None:
            self._claim.note(text)

    def way_on(self) -> str:
        """How a run that was stopped goes on."""
        if not self.resuming and self._claim is not None and self._claim.keeps_earlier:
            return f"no step was taken, and {self.directory} holds the earlier run as it was"
        command = f"{self.command} --out {shlex.quote(str(self.directory))} --resume"
        if "RANK" not in os.environ:
            return f"go on with: {command}"
        return f"go on with the launcher and its own flags in front, as before: torchrun ... -m {command}"

    def alarm(self, text: str) -> None:
        """What ends this rank, and how to go on, to its terminal and to `log.txt`; the summary says that the run failed."""
        text = printable(f"{text}; {self.way_on()}", LINE_CHARACTERS)
        print(f"rank {self.accelerator.process_index}: {text}", file=sys.stderr, flush=True)
        self.note(text)
        with contextlib.suppress(VitkitError):
            self._write_summary("failed")

    def finish(self, status: Literal["finished", "interrupted", "failed"] = "finished") -> None:
        """Write the summary and the report, and let the directory go. Called for a recipe by `vitkit run`."""
        self.watchdog.close()
        if self._claim is not None and (status == "finished" or not self._claim.keeps_earlier):
            self._open()
            self._copy_modules()
            summary = self._summary(status)
            reported = bool(self.history.losses) and self._survives("the report could not be written", lambda: self._report(summary))
            write_json(self.directory / "summary.json", summary)  # the last file: a run that says it has finished has all
            if self.history.losses and status == "finished":
                self.say(self.history.closing_line() + (f"\nreport: {self.directory / 'report.html'}" if reported else ""))
        self._track(lambda: self.accelerator.end_training())
        self.close()

    def _report(self, summary: Mapping[str, Any]) -> None:
        from vitkit.report import write_report  # matplotlib takes a second to import, and only this needs it

        write_report(self.directory, self.history.figures, summary)

    def _track(self, call: Callable[[], Any]) -> None:
        """Call trackers, where there are any; after an error the run continues without them."""
        if self.accelerator.trackers and not self._survives("the trackers failed, and the run continues without them", call):
            self.accelerator.trackers = []

    def _survives(self, failure: str, call: Callable[[], Any]) -> bool:
        """Call something that a run can do without; an error costs a line, never the model, the summary or the tables."""
        try:
            call()
            return True
        except Exception as error:
            self.say(f"{failure}: {type(error).__name__}: {printable(error)}")
            return False

    def discard(self) -> None:
        """Leave the directory of a run that was refused before its first step as it was; one that has trained is finished."""
        if self._claim is not None and self._claim.opened:
            self.finish("failed")
        else:
            self.close()

    def close(self) -> None:
        """Let the directory go to another process; where nothing was written it is as it was found."""
        self.watchdog.close()
        if self._claim is not None:
            self._claim.release()

    # -- what the loop calls ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def progress(self, epochs: int, steps: int) -> Iterator[None]:
        """The progress bar, on the main process alone, as long as the loop runs."""
        if not self.is_main:
            yield
            return
        with Progress(epochs, steps, self.console) as self._progress:
            try:
                yield
            finally:
                self._progress, _ = None, self._progress

    def show(self, fit: Mapping[str, Any], rate: float) -> None:
        """Bring the progress bar up to date."""
        if self._progress is not None:
            count = max(fit["count"], 1)
            parts = {name: total / count for name, total in fit["sums"].items()}
            self._progress.step(fit["epoch"] + 1, fit["batch"], parts, rate)

    def begin(self) -> None:
        """The first step has been taken: trackers start, and the directory becomes this run's. Later calls do nothing."""
        if self._begun or self.dry_run:
            return
        self._begun, started = True, bool(self._trackers)
        if started:
            replaces = self._claim is not None and self._claim.replaces
            with trackers_aside(self.directory) if replaces else contextlib.nullcontext():
                config = {name: value for name, value in self.arguments.items() if value is not None}
                self.accelerator.init_trackers(self.name, config=config)
        self._open(keep=(TRACKERS,) if started else ())

    def log_losses(self, epoch: Epoch, *, lr: float, fit: Mapping[str, Any]) -> None:
        """Write an epoch's row of `losses.csv`, a line of the log, and what trackers want."""
        self.begin()  # one that was stopped after its last step takes no other
        row = {"epoch": epoch.number, "step": epoch.step, **epoch.losses, "lr": lr}
        row["images_per_second"] = round(fit["images"] / max(fit["train_seconds"], 1e-9), 1)
        row["seconds"] = round(self.history.seconds, 2)
        self.history.add_losses(row)
        parts = " | ".join(f"{name} {value:.4f}" for name, value in epoch.losses.items())
        self.say(f"epoch {epoch.number}/{epoch.epochs} | {parts} | {row['images_per_second']:.0f} images/s")
        if self.is_main:
            self.history.write_losses(self.directory)
        self._track(lambda: self.accelerator.log({**epoch.losses, "lr": lr}, step=epoch.step))

    def log_metrics(self, epoch: Epoch) -> None:
        """Write an evaluated epoch's row of `metrics.csv`."""
        row = {"epoch": epoch.number, "step": epoch.step, "loss": epoch.losses.get("loss"), **epoch.logged}
        self.history.add_metrics(row)
        self.say("  " + " | ".join(f"{name} {value:.4f}" for name, value in epoch.logged.items()))
        if self.is_main:
            self.history.write_metrics(self.directory)
        self._write_summary("running")
        self._track(lambda: self.accelerator.log(epoch.logged, step=epoch.step))

    def settings(self) -> dict[str, Any]:
        """What the runner resolved: device, precision, compile, seed, gradient accumulation, processes."""
        return {
            "device": str(self.device), "precision": self.precision, "compile": self.compile, "seed": self.seed,
            "grad_accum": self.grad_accum, "processes": self.accelerator.num_processes,
            "parallel": "fsdp" if self.sharded else "ddp" if self.accelerator.num_processes > 1 else "none",
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _open(self, keep: tuple[str, ...] = ()) -> None:
        if self._claim is not None and not self._claim.opened:
            self._claim.open(self._summary("running"), keep=keep)
            self._copy_modules()

    def _copy_modules(self) -> None:
        """Write the modules that the recipe has imported from its folder beside the copy of the recipe."""
        if self.recipe is not None:
            self.recipe.modules.note()
            for relative, source in self.recipe.modules.sources.items():
                path = self.directory / MODULES / relative
                if not path.exists():
                    with atomic_write(path) as temporary:
                        temporary.write_bytes(source)

    def _write_summary(self, status: str) -> None:
        if self._claim is not None and not self._claim.keeps_earlier:
            self._open()
            write_json(self.directory / "summary.json", self._summary(status))

    def _summary(self, status: str) -> dict[str, Any]:
        return {
            "recipe": self.name,
            "status": status,
            "dataset": self._dataset,
            "seed": self.seed,
            "arguments": self.arguments,
            "requested": self._requested,
            "settings": self.settings(),
            **self.history.summary(),
            "parameters": self._parameters,
            "steps": self._fit.get("step", 0),
            "versions": versions(),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "command": self.command,
        }


def _registered_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model that a registry built, by the names of their attributes; losses without parameters left out."""
    if isinstance(model, GradCache):
        model = model.model
    parts = {name: part for name, part in model.named_children() if isinstance(getattr(part, "spec", None), Spec)}
    kept = {name: part for name, part in parts.items() if cast(Spec, part.spec).kind != "loss" or any(True for _ in part.parameters())}
    if not kept:
        raise UsageError(
            f"no attribute of {type(model).__name__} was built by a registry; build the parts with backbones.build(...) or "
            f"heads.build(...), or name the modules: run.save(backbone=...)"
        )
    return kept


__all__ = ["DryRun", "Epoch", "Run"]
