"""A run, as a recipe sees it: datasets, training, saving, and lines and figures for the report."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.text import Text
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vitkit.contracts import Evaluator, ReportFigure, Scores, SplitName
from vitkit.data.dataset import resolve, stand_in
from vitkit.data.preprocess import Preprocessing
from vitkit.errors import LINE_CHARACTERS, RunDirectoryError, UsageError, VitkitError, printable
from vitkit.models import saving
from vitkit.registry import Spec
from vitkit.runs.directory import BEST, Claim, claim, read_summary
from vitkit.runs.history import RESERVED
from vitkit.training.accelerator import make_accelerator, resolve_device, resolve_precision, resolve_trackers
from vitkit.training.checkpoint import load_state
from vitkit.training.dry_run import preview
from vitkit.training.epoch import Epoch, measure
from vitkit.training.flags import plain
from vitkit.training.gradcache import GradCache
from vitkit.training.loop import Fit, check_fit_arguments
from vitkit.training.monitor import Mode, check_monitor
from vitkit.training.recipe import Recipe
from vitkit.training.schedules import Schedule
from vitkit.training.session import Session


class DryRun(Exception):
    """Raised instead of training when `dry_run=True`, after every value has been resolved and shown."""


class Run:
    """One execution of a recipe, and the directory that it writes.

    - `out`: the directory (default `runs/<name>/<time>`).
    - `seed`: fixes every random choice.
    - `device`: auto, cpu, cuda or mps.
    - `precision`: auto, fp32, bf16 or fp16. auto is bf16 if the hardware supports it; a resumed run keeps its precision.
    - `compile`: auto, on or off.
    - `resume`: resume the run in `out`. `overwrite`: replace it, once the first step is taken.
    - `grad_accum`: number of batches per optimiser step.
    - `report_to`: accelerate's trackers beside the CSV files.
    - `dry_run`: show the model instead of training it; with `devices` also the memory and time of a run on that many devices.

    Nothing is written before the first step, so a refusal leaves the directory as it was. Raises `UsageError` for a setting that
    this machine does not support and `RunDirectoryError` for a directory in use.
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
        _check_settings(seed, grad_accum, resume, overwrite, dry_run, devices)
        reports = report_to if isinstance(report_to, str) else ",".join(report_to)
        trackers = resolve_trackers(reports.split(","))
        kind = resolve_device(device)
        resolve_precision(precision, kind)
        held: Claim | None = None
        directory = Path(out or "runs")
        if not dry_run and os.environ.get("RANK", "0") == "0":  # launchers set RANK; the session sends the others the directory
            source = recipe.source if recipe else None
            held = claim(Path(out) if out else None, name, recipe=source, resume=resume, overwrite=overwrite)
            directory = held.directory
        try:
            self._earlier = read_summary(directory) if resume else {}
            chosen = self._earlier.get("settings", {}).get("precision", "auto") if precision == "auto" else precision
            chosen = resolve_precision(str(chosen), kind)
            accelerator = make_accelerator(kind, chosen, trackers, directory)
        except BaseException:
            if held is not None:
                held.release()
            raise
        self.session = Session(
            accelerator, directory=directory, claim=held, seed=seed, precision=chosen, grad_accum=grad_accum, compile=compile,
            resuming=resume and not dry_run, name=name, command=command, modules=recipe.modules if recipe else None, console=console,
        )  # fmt: skip
        self.session.arguments = {key: plain(value) for key, value in (arguments or {}).items()}
        self.session.requested = {
            **self.session.arguments, "seed": seed, "device": device, "precision": precision, "compile": compile,
            "grad_accum": grad_accum, "report_to": reports,
        }  # fmt: skip
        if self._earlier.get("status") == "running":
            self.session.note("the run stopped here without a message: its process was killed, or the machine stopped")
        torch.manual_seed(seed)
        self._dry_run, self._devices = dry_run, devices
        self._datasets: list[Any] = []
        self._classes: list[str] = []
        self._preprocessing: dict[str, Any] = {}
        self._fit: Fit | None = None
        self._saved = False

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return cast(Path, self.session.directory)

    @property
    def seed(self) -> int:
        return self.session.seed

    @property
    def device(self) -> torch.device:
        return self.session.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the run's files."""
        return self.session.is_main

    @property
    def resuming(self) -> bool:
        """True if the run resumes an earlier one."""
        return self.session.resuming

    @property
    def arguments(self) -> dict[str, Any]:
        """The values of the recipe's flags, for the summary."""
        return self.session.arguments

    def dataset(self, name: str = "auto", *, default: str, **kwargs: Any) -> Any:
        """A dataset by name; `auto` is `default`, or the embedded `digits` with a warning if that is not available.

        The summary and the report name the first dataset of a run. A resumed run uses the dataset that it began with.
        Raises `UnknownNameError`, `DatasetError`, and `RunDirectoryError` if the images, labels or classes have changed.
        """
        earlier = ({} if self._datasets else self._earlier.get("dataset")) or {}
        earlier = earlier if earlier.get("asked") == name else {}
        wanted = earlier.get("fallback_for")
        if wanted:
            dataset = stand_in(wanted, f"this run began without {wanted} and resumes without it", **kwargs)
        else:  # a run that began with the recipe's dataset never falls back to digits
            dataset = resolve(default if earlier and name == "auto" else name, default=default, **kwargs)
        if dataset.notice and self.session.is_main:
            warning = Text.assemble(("WARNING", "bold yellow"), " ", printable(dataset.notice, LINE_CHARACTERS))
            self.session.console.print(warning, soft_wrap=True)
        self._datasets.append(dataset)
        if len(self._datasets) == 1:
            self._record(dataset, name, kwargs, earlier)
        return dataset

    def steps(self, batches: Any, epochs: int = 1) -> int:
        """The number of optimiser steps in `epochs` epochs, for schedules.

        `grad_accum` batches make one step; fewer batches at the end of an epoch also make one.

        Raises `UsageError` for epochs below 1, `batches` without a length, and an epoch without batches.
        """
        return self.session.steps(batches, epochs)

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
        weight_decay: Schedule | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
        patience: int | None = None,
    ) -> Iterator[Epoch]:
        """Train, yielding after each epoch: evaluate and `epoch.log(...)` in the loop's body, `break` to stop early.

        - `model(batch)` returns a dict with a scalar tensor `loss` and its parts. Any of its modules may offer
          `set_step(step, total)`, called before each forward pass, and `after_step(step, total)`, called after each step of the
          optimiser; steps count from 0. The model may offer `uninformed(batch_size)`, see `contracts.Loss`.
        - `batches`: `split.batches(...)`, or any sized iterable of dicts of tensors.
        - `schedule` is stepped once an optimiser step, `run.steps(batches, epochs)` times in all.
        - `clip` bounds the norm of the gradient.
        - `ema` is the decay of averaged weights, smaller in the first steps, see `ModelEma`. The model holds them while an epoch is
          yielded and at the end.
        - `weight_decay` sets the decay of the groups that have one, before each step; see `vitkit.training.schedules`.
        - `monitor` keeps the best checkpoint of a metric on the validation split, and `patience` evaluations without a better one end the
          loop. The direction comes from the metric's protocol; `mode` gives it for a number without one (default "max"). A value that is
          not finite is never better, and an epoch whose body ends with `break` is not compared. The model ends with its last weights;
          `run.load_best(model)` loads the best ones.

        With `grad_accum` k the gradient is that of k batches joined into one, if the loss is a mean over samples or the model is
        `GradCacheable`. For other losses it is the mean of the batches' gradients, weighted by their numbers of samples.

        A loss, a clipped gradient's norm or a weight that is not finite stops the run with `RunError`, within 50 batches. `log.txt` then
        holds the losses, gradient norms and learning rates of the batches before; the last checkpoint is older than the bad value. No
        batch is skipped. A finite loss never stops a run. After a spike, a loss more than 10 standard deviations above the median of
        the last 100 batches, `log.txt` holds the same values.

        Ranks: each calls it. Launched for FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`) a copy of `model` is sharded and
        trained; `model` gets its weights, or their average, before an epoch is yielded and at the end. Checkpoints hold full weights,
        so a run may resume on another number of devices.

        Raises `UsageError` before the first step for a value out of range, and for a second fit of one run.
        """
        if self._fit is not None:
            raise UsageError(
                "run.fit was called before in this run; a run has one fit. To train in stages, change the training in the body of "
                "the loop by epoch.number, or write a second recipe that starts from vitkit.load(DIRECTORY)"
            )
        self.steps(batches, epochs)
        check_fit_arguments(model, optimizer=optimizer, schedule=schedule, clip=clip, ema=ema)
        check_monitor(monitor, mode, patience)
        self.session.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._note_data(batches)
        if self._dry_run:
            tables = preview(
                self.session, model, batches, epochs=epochs, optimizer=optimizer, ema=ema is not None, devices=self._devices
            )
            self.session.console.print(tables)
            raise DryRun
        self._fit = Fit(
            self.session, model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=clip, ema=ema,
            weight_decay=weight_decay, monitor=monitor, mode=mode, patience=patience,
        )  # fmt: skip
        return iter(self._fit)

    def check(self, data: Any, *evaluators: Evaluator, split: SplitName = "test") -> list[Evaluator]:
        """The evaluators that suit `data`, found before the training: each `check(data, split)` that raises `UsageError` leaves one out.

        A line reports each evaluator that is left out. Evaluators without a method `check` stay.
        """
        usable = []
        for evaluator in evaluators:
            try:
                check = getattr(evaluator, "check", None)
                if callable(check):
                    check(data, split)
                usable.append(evaluator)
            except UsageError as error:
                self.session.say_left_out(evaluator, error)
        return usable

    def measure_untrained(self, model: nn.Module, data: Any, *evaluators: Evaluator, split: SplitName = "test") -> None:
        """Measure `model` as it is before `fit`: protocols of metrics that are logged later hold these values as `untrained`.

        The model moves to the run's device. A dry run measures nothing. Ranks: each calls it. Raises `UsageError` after `fit`.
        """
        if self._fit is not None:
            raise UsageError("measure_untrained comes after run.fit, which trains the model; call it before run.fit")
        if not self._dry_run:
            self.session.history.untrained |= measure(self.session, model.to(self.device), data, evaluators, split)

    def evaluate(self, model: nn.Module, data: Any, *evaluators: Evaluator, split: SplitName = "test", note: str = "") -> Scores:
        """After the loop: call evaluators on a split, as `Epoch.evaluate` does, and add their scores to the last epoch's row.

        Use it to measure the checkpoint that `load_best` loaded; `note` then says so in each protocol. Ranks: each calls it. Raises
        `UsageError` before `fit` has trained an epoch, and for a metric that the row has already.
        """
        history = self.session.history
        if self._fit is None or not history.losses:
            raise UsageError("run.evaluate comes after the loop over run.fit; in the loop use epoch.evaluate")
        row = history.losses[-1]
        measured = measure(self.session, model.to(self.device), data, evaluators, split)
        epoch = Epoch(self.session, row["epoch"], self._fit.epochs, row["step"], {"loss": row["loss"]})
        if history.metrics and history.metrics[-1]["epoch"] == row["epoch"]:
            epoch.logged = {name: value for name, value in history.metrics[-1].items() if name not in RESERVED}
        if taken := sorted(epoch.logged.keys() & measured.keys()):
            raise UsageError(f"{', '.join(taken)} of epoch {row['epoch']} was logged before; measure it in the loop, or after it, not both")
        for name, protocol in measured.protocols.items():
            measured.protocols[name] = replace(protocol, note="; ".join(filter(None, (protocol.note, note))))
        epoch.log(measured)
        return measured

    def load_best(self, model: nn.Module) -> int:
        """After the loop, load the weights that were best in `monitor` into the `model` of `fit`; returns their epoch.

        They are the weights that were evaluated: averaged ones with `ema`. Ranks: each calls it, and sees the run's directory.
        Raises `UsageError` if no best checkpoint was kept, or for another model.
        """
        self.session.accelerator.wait_for_everyone()  # rank 0 may still be writing it
        path = self.directory / BEST
        if not path.exists():
            raise UsageError(
                "no best checkpoint was kept: give run.fit monitor='METRIC', and epoch.log a finite value of it in the loop"
            )
        state = load_state(path)
        try:
            model.load_state_dict(state.evaluated)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{path} belongs to another model: {reason:.400}; give load_best the model that run.fit trained") from None
        return int(state.progress["fit"]["best_epoch"])

    def save(self, model: nn.Module | None = None, **modules: nn.Module) -> Path:
        """Write `model.safetensors` and `config.json`.

        `model` is the one that was trained: its parts that a registry built are saved under their attributes' names, losses only
        if they have parameters. Or give the modules by name: `run.save(backbone=backbone)`. Classes and preprocessing are those
        of the data that was trained on. Raises `UsageError` if no part was built by a registry.
        """
        if model is not None:
            modules = {**_registered_parts(model), **modules}
        if self._fit is not None and not self._preprocessing:
            self.say("the batches name no preprocessing: the saved model takes only preprocessed images")
        self.session.open()
        dataset = self.session.dataset
        if self.session.is_main:
            saving.save(
                self.directory,
                {name: self.session.accelerator.unwrap_model(module) for name, module in modules.items()},
                preprocessing=self._preprocessing,
                classes=self._classes or (list(self._datasets[0].classes) if len(self._datasets) == 1 else []),
                arguments=self.arguments,
                extra={
                    "recipe": self.session.name, "dataset": dataset.get("name"), "seed": self.seed,
                    "data": {key: dataset[key] for key in ("asked", "arguments", "digest") if key in dataset},
                },
            )  # fmt: skip
        self._saved = True
        return self.directory

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision, as a context."""
        return self.session.autocast()

    def reference(self, label: str, **lines: float) -> None:
        """Horizontal lines for the report's plots: `run.reference("published", linear_top1=0.95)`."""
        self.session.history.references.setdefault(label, {}).update({name: float(value) for name, value in lines.items()})

    def figure(self, name: str, figure: ReportFigure) -> None:
        """A figure for the report: a confusion matrix, a map of embeddings, attention maps or a sheet of images."""
        self.session.history.figures[name] = figure

    def say(self, text: str) -> None:
        """Print one line to the terminal and write it to `log.txt`."""
        self.session.say(text)

    def finish(self, status: Literal["finished", "interrupted", "failed"] = "finished") -> None:
        """Write the summary and the report, and release the directory. `vitkit run` calls it for a recipe."""
        self.session.finish(status)

    def discard(self) -> None:
        """End a refused run: before the first step its directory stays as it was, after it the run is marked as failed."""
        if self.session.claim is not None and self.session.claim.opened:
            self.session.finish("failed")
        else:
            self.session.close()

    def close(self) -> None:
        """Release the directory; if nothing was written it is as it was before the run."""
        self.session.close()

    def save_after_error(self) -> None:
        """Save the model's registered parts if an error came after the last epoch and before `save`."""
        fit = self._fit
        if self._saved or fit is None or fit.progress["epoch"] + fit.progress["trained"] < fit.epochs:
            return
        with contextlib.suppress(VitkitError):
            self.save(fit.module)
            self.say("all epochs were trained before the error, so the model was saved")

    def _record(self, dataset: Any, asked: str, arguments: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
        """Keep the facts of the dataset for the summary; on resuming refuse another one."""
        counts = {"train": len(dataset.train), "test": len(dataset.test)}
        digest = dataset.digest
        advice = "put that dataset back to resume, or start another run with another --out"
        if earlier and counts != {split: earlier.get(split) for split in counts}:
            before, now = (" + ".join(f"{facts.get(split)} {split}" for split in counts) for facts in (earlier, counts))
            raise RunDirectoryError(
                f"the run in {self.directory} began with {before} images of {earlier.get('name')}, and now there are {now} of "
                f"{dataset.name}; {advice}"
            )
        if earlier.get("digest", digest) != digest:
            raise RunDirectoryError(
                f"the run in {self.directory} began with other images, labels or classes of {dataset.name} than there are now; {advice}"
            )
        self.session.dataset = {
            "name": dataset.name, "asked": asked, "fallback_for": dataset.fallback_for, "notice": dataset.notice,
            "arguments": {key: plain(value) for key, value in arguments.items()}, "digest": digest,
            "classes": list(dataset.classes), **counts, "val": len(dataset.val), "val_note": dataset.val_note,
            "source": dataset.source, "licence": dataset.licence, "hub_id": dataset.hub_id,
        }  # fmt: skip

    def _note_data(self, batches: Any) -> None:
        """Keep the classes and the preprocessing of the data that is trained on, for `save`."""
        preprocessing = getattr(batches, "preprocessing", None)
        if isinstance(preprocessing, Preprocessing):
            self._preprocessing = preprocessing.to_json()
        for source in (batches, getattr(batches, "split", None), getattr(batches, "dataset", None)):  # a DataLoader has a dataset
            self._classes = self._classes or list(getattr(source, "classes", ()))


def _check_settings(seed: int, grad_accum: int, resume: bool, overwrite: bool, dry_run: bool, devices: int | None) -> None:
    if grad_accum < 1:
        raise UsageError(f"--grad-accum {grad_accum}: expected at least 1")
    if devices is not None and not dry_run:
        raise UsageError(
            f"--devices {devices} estimates the memory and time of a run on that many devices and needs --dry-run; to train on them: "
            f"torchrun --nproc-per-node {devices} -m vitkit run ..."
        )
    if devices is not None and devices < 1:
        raise UsageError(f"--devices {devices}: expected at least 1")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: expected a whole number from 0 to 2**63 - 1")
    if resume and overwrite:
        raise RunDirectoryError("--resume continues a run and --overwrite discards it; give one of the two")


def _registered_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model that a registry built, by attribute name; losses without parameters are left out."""
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
