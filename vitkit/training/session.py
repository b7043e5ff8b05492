"""The session of a run: its device, precision, history, log and files, as the training loop uses them."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from vitkit.console import TextConsole
from vitkit.distributed.collectives import broadcast_text
from vitkit.distributed.watchdog import RankWatchdog
from vitkit.errors import LINE_CHARACTERS, UsageError, VitkitError, printable
from vitkit.files import atomic_write, write_json
from vitkit.runs.directory import LOCK, MODULES, TRACKERS, Claim, read_summary, trackers_aside
from vitkit.runs.history import History
from vitkit.runs.summary import processor, versions
from vitkit.training.accelerator import shards
from vitkit.training.progress import Progress
from vitkit.training.recipe_modules import LocalModules
from vitkit.validation import at_least

Status = Literal["running", "finished", "interrupted", "failed"]


class Session:
    """Directory, device, precision, seed, history, progress and log of one run.

    Without a `directory` nothing is written, and the loop keeps no checkpoint. `claim` holds the directory on rank 0, the only
    rank that writes. `arguments`, `requested` and `dataset` go into the summary.
    """

    def __init__(
        self,
        accelerator: Any,
        *,
        directory: Path | None = None,
        claim: Claim | None = None,
        seed: int = 0,
        precision: str = "fp32",
        grad_accum: int = 1,
        compile: str = "off",
        resuming: bool = False,
        name: str = "notebook",
        command: str = "",
        modules: LocalModules | None = None,
        console: Console | None = None,
    ) -> None:
        self.accelerator, self.claim, self.modules = accelerator, claim, modules
        self.seed, self.precision, self.grad_accum, self.compile = seed, precision, grad_accum, compile
        self.resuming, self.name, self.command = resuming, name, command
        self.console = console or TextConsole(stderr=True)
        self.device: torch.device = accelerator.device
        self.is_main: bool = accelerator.is_main_process
        self.sharded = shards(accelerator)
        self.directory = directory and Path(broadcast_text(str(directory), device=self.device))
        self.watchdog = RankWatchdog(self.alarm)
        self.history = History()
        self.arguments: dict[str, Any] = {}
        self.requested: dict[str, Any] = {}
        self.dataset: dict[str, Any] = {}
        self.parameters = self.steps_taken = 0
        self._progress: Progress | None = None
        self._tracking = bool(accelerator.log_with)
        self._began = False

    def steps(self, batches: Any, epochs: int = 1) -> int:
        """The number of optimiser steps in `epochs` epochs; see `Run.steps`."""
        at_least(1, epochs=epochs)
        try:
            count = len(batches)
        except TypeError:
            raise UsageError("run.fit needs the number of batches in an epoch: give it batches with len()") from None
        if count == 0:
            raise UsageError("an epoch has no batches: the batch size is larger than the training set, or it is empty")
        return epochs * -(-count // self.grad_accum)

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision, as a context."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    # -- terminal and log ---------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print one line to the terminal and write it to `log.txt`, on rank 0."""
        if not self.is_main:
            return
        text = printable(text, LINE_CHARACTERS)
        self.note(text)
        with contextlib.suppress(OSError):  # the terminal may be gone
            if self._progress is not None:
                self._progress.line(text)
            else:
                self.console.print(text, markup=False, soft_wrap=True)

    def say_left_out(self, evaluator: Any, reason: Exception) -> None:
        """Report an evaluator that is left out, and the reason."""
        name = getattr(getattr(evaluator, "spec", None), "name", type(evaluator).__name__)
        self.say(f"the evaluator {printable(name)} is left out: {printable(reason)}")

    def note(self, text: str, *details: str) -> None:
        """Write one line to `log.txt`, and indented lines of details below it."""
        if self.claim is not None:
            self.claim.note(text, *details)

    @contextlib.contextmanager
    def progress(self, epochs: int, steps: int) -> Iterator[None]:
        """Show the progress bar on rank 0 as long as the loop runs."""
        if not self.is_main:
            yield
            return
        with Progress(epochs, steps, self.console) as self._progress:
            try:
                yield
            finally:
                self._progress, _ = None, self._progress

    def show(self, fit: Mapping[str, Any], images_per_second: float) -> None:
        """Update the progress bar."""
        if self._progress is not None:
            count = max(fit["count"], 1)
            parts = {name: total / count for name, total in fit["sums"].items()}
            self._progress.step(fit["epoch"] + 1, fit["batch"], parts, images_per_second)

    def how_to_resume(self) -> str:
        """The last sentence of a run that was stopped: the command that resumes it."""
        if not self.resuming and self.claim is not None and self.claim.keeps_earlier:
            return f"no step was taken, and {self.directory} holds the earlier run as it was"
        command = f"{self.command} --out {shlex.quote(str(self.directory))} --resume"
        if "RANK" not in os.environ:
            return f"resume with: {command}"
        return f"resume with the same launcher and its flags in front: torchrun ... -m {command}"

    # -- the run's files ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """After the first step: start the trackers, and make the directory this run's. Later calls do nothing."""
        if self._began:
            return
        self._began = True
        if self._tracking:
            replaces = self.claim is not None and self.claim.replaces
            aside = trackers_aside(self.directory) if replaces and self.directory else contextlib.nullcontext()
            with aside:
                config = {name: value for name, value in self.arguments.items() if value is not None}
                self.accelerator.init_trackers(self.name, config=config)
        self.open(keep=(TRACKERS,) if self._tracking else ())

    def open(self, keep: tuple[str, ...] = ()) -> None:
        """Make the directory this run's, with a summary and a copy of the recipe. Later calls do nothing."""
        if self.claim is not None and not self.claim.opened:
            self.claim.open(self._summary("running"), keep=keep)
            self._copy_modules()

    def log_losses(self, row: dict[str, Any], epochs: int) -> None:
        """Write an epoch's row of `losses.csv` and a line of the log, and hand the row to the trackers."""
        self.begin()  # a run that resumes after its last step takes no further step
        row = {**row, "seconds": round(self.history.seconds, 2)}
        self.history.add_losses(row)
        parts = " | ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in NOT_PARTS)
        self.say(f"epoch {row['epoch']}/{epochs} | {parts} | {row['images_per_second']:.0f} images/s")
        if self.claim is not None:
            self.history.write_losses(self.claim.directory)
        tracked = {name: value for name, value in row.items() if name not in NOT_PARTS or name == "lr"}
        self._track(lambda: self.accelerator.log(tracked, step=row["step"]))

    def log_metrics(self, row: dict[str, Any], logged: Mapping[str, float]) -> None:
        """Write an evaluated epoch's row of `metrics.csv`, and hand its metrics to the trackers."""
        self.history.add_metrics({**row, **logged})
        self.say("  " + " | ".join(f"{name} {value:.4f}" for name, value in logged.items()))
        if self.claim is not None:
            self.history.write_metrics(self.claim.directory)
        self._write_summary("running")
        self._track(lambda: self.accelerator.log(dict(logged), step=row["step"]))

    def finish(self, status: Status = "finished") -> None:
        """Write the summary and the report, and release the directory."""
        self.watchdog.close()
        if self.claim is not None and (status == "finished" or not self.claim.keeps_earlier):
            self.open()
            self._copy_modules()
            summary = self._summary(status)
            reported = bool(self.history.losses) and self._survives("the report could not be written", lambda: self._report(summary))
            write_json(self.claim.directory / "summary.json", summary)  # last: a run that says it has finished has all files
            if self.history.losses and status == "finished":
                self.say(self.history.closing_line())
                if reported:
                    self.say(f"report: {self.directory}/report.html")
        self._track(self.accelerator.end_training)
        self.close()

    def close(self) -> None:
        """Release the directory; if nothing was written it is as it was before the run."""
        self.watchdog.close()
        if self._progress is not None:  # a loop that was left by `break`
            self._progress.stop()
            self._progress = None
        if self.claim is not None:
            self.claim.release()

    def alarm(self, text: str) -> None:
        """Report the reason why this rank ends, to its terminal and to `log.txt`, and mark the run as failed.

        Rank 0 writes the files. If its process is dead, the first rank that notices writes instead.
        """
        text = printable(f"{text}; {self.how_to_resume()}", LINE_CHARACTERS)
        with contextlib.suppress(OSError):
            print(f"rank {self.accelerator.process_index}: {text}", file=sys.stderr, flush=True)
        if self.claim is None and not self.is_main and self.directory is not None:
            self._report_for_rank_0(text)
        self.note(text)
        with contextlib.suppress(VitkitError):
            self._write_summary("failed")

    def settings(self) -> dict[str, Any]:
        """The resolved settings of the runner."""
        return {
            "device": str(self.device), "precision": self.precision, "compile": self.compile, "seed": self.seed,
            "grad_accum": self.grad_accum, "processes": self.accelerator.num_processes,
            "parallel": "fsdp" if self.sharded else "ddp" if self.accelerator.num_processes > 1 else "none",
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _report(self, summary: Mapping[str, Any]) -> None:
        from vitkit.report import write_report  # importing matplotlib takes a second

        assert self.claim is not None
        write_report(self.claim.directory, self.history.figures, summary)

    def _track(self, call: Callable[[], Any]) -> None:
        """Call the trackers, if there are any; after an error the run continues without them."""
        if self.accelerator.trackers and not self._survives("the trackers failed, and the run continues without them", call):
            self.accelerator.trackers = []

    def _survives(self, failure: str, call: Callable[[], Any]) -> bool:
        """Call an optional part of a run; an error is reported in one line, returns False, and does not end the run."""
        try:
            call()
        except Exception as error:
            self.say(f"{failure}: {type(error).__name__}: {printable(error)}")
            return False
        return True

    def _report_for_rank_0(self, text: str) -> None:
        assert self.directory is not None
        with contextlib.suppress(OSError, Timeout), FileLock(self.directory / LOCK, timeout=0):  # rank 0 holds it while it lives
            summary = read_summary(self.directory)
            if summary.get("status") == "running":
                with (self.directory / "log.txt").open("a", encoding="utf-8") as log:
                    log.write(f"rank {self.accelerator.process_index}: {text}\n")
                write_json(self.directory / "summary.json", {**summary, "status": "failed"})

    def _copy_modules(self) -> None:
        """Write the modules that the recipe has imported from its folder beside the copy of the recipe."""
        if self.modules is None or self.claim is None:
            return
        self.modules.note()
        for relative, source in self.modules.sources.items():
            path = self.claim.directory / MODULES / relative
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(source)

    def _write_summary(self, status: Status) -> None:
        if self.claim is not None and not self.claim.keeps_earlier:
            self.open()
            write_json(self.claim.directory / "summary.json", self._summary(status))

    def _summary(self, status: Status) -> dict[str, Any]:
        return {
            "recipe": self.name,
            "status": status,
            "dataset": self.dataset,
            "seed": self.seed,
            "arguments": self.arguments,
            "requested": self.requested,
            "settings": self.settings(),
            **self.history.summary(),
            "parameters": self.parameters,
            "steps": self.steps_taken,
            "versions": versions(),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "command": self.command,
        }


NOT_PARTS = ("epoch", "step", "lr", "images_per_second", "seconds")
"""Columns of `losses.csv` that are not the loss or one of its parts."""

__all__ = ["Session", "Status"]
