"""A run's directory: claimed by one process at a time, and never overwritten silently."""

import contextlib
import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vitkit.errors import RunDirectoryError, RunError
from vitkit.files import atomic_write, is_leftover, remove_leftovers, write_json

FILES = (
    "metrics.csv", "losses.csv", "summary.json", "model.safetensors", "config.json", "report.html", "recipe.py", "log.txt",
)  # fmt: skip
TRACKERS, ASIDE = "trackers", ".trackers"
MODULES = "modules"
"""Copies of the modules that the recipe imports from its own folder."""
FOLDERS = ("checkpoints", "plots", TRACKERS, MODULES)
LAST = Path("checkpoints/last.safetensors")
BEST = Path("checkpoints/best.safetensors")


@dataclass
class Claim:
    """A run's directory, held until the process ends; nothing in it is touched before `open`.

    `replaces` says that it holds an earlier run, which stays as it is until the new one takes its place, `resumes` that the
    earlier run goes on. `recipe` is the source that the run keeps a copy of.
    """

    directory: Path
    replaces: bool
    resumes: bool
    lock: FileLock
    made: list[Path]
    recipe: bytes | None = None
    opened: bool = False
    _noted: list[str] = field(default_factory=list)

    @property
    def keeps_earlier(self) -> bool:
        """Whether the directory still holds an earlier run, or an earlier sitting, that this one has added nothing to."""
        return not self.opened and (self.resumes or self.replaces)

    def open(self, summary: Mapping[str, Any], *, keep: Collection[str] = ()) -> None:
        """From here on the directory is this run's: an earlier one that it replaces goes but for `keep`, and the summary, the
        recipe and what was noted are written. Later calls do nothing.
        """
        if self.opened:
            return
        if self.replaces:
            # What is written anew below stays until then, so that a kill finds one of the two.
            anew = ("summary.json",) if self.recipe is None else ("summary.json", "recipe.py")
            remove_run(self.directory, keep=(*anew, *keep))
        self.opened = True
        write_json(self.directory / "summary.json", summary)
        if self.recipe is not None:
            with atomic_write(self.directory / "recipe.py") as temporary:
                temporary.write_bytes(self.recipe)
        noted, self._noted = self._noted, []
        self._log(noted)

    def note(self, text: str) -> None:
        """A line for `log.txt`, written at once or with `open`."""
        line = f"{time.strftime('%H:%M:%S')} {text}\n"
        if self.opened or self.resumes:
            self._log([line])
        else:
            self._noted.append(line)

    def release(self) -> None:
        """Let the directory go to another process; where nothing was written it is as it was found: without the lock's file,
        and gone where it was made for this run.
        """
        if self.opened:
            self.lock.release()
        else:
            _undo(self.lock, self.made)

    def _log(self, lines: list[str]) -> None:
        with contextlib.suppress(OSError), (self.directory / "log.txt").open("a", encoding="utf-8") as log:
            log.writelines(lines)


def claim(out: Path | None, name: str, *, recipe: bytes | None = None, resume: bool, overwrite: bool) -> Claim:
    """The directory of a run, held by this process; what is refused leaves it as it was.

    Without `out` it is `runs/<name>/<time>`, or with `resume` the newest unfinished run there. Raises
    `RunDirectoryError` where another process holds it, where it holds a run and neither `resume` nor `overwrite`
    says what to do, or where there is nothing to resume; `RunError` where it cannot be written.
    """
    directory = out or (newest_unfinished(name) if resume else fresh(name))
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(f"--out {directory} is a file; a run needs a directory")
    made: list[Path] = []
    try:
        made = [path for path in (directory / ".lock", directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise RunDirectoryError(
            f"{directory} is in use by another process; wait until it ends, or choose another --out"
        ) from None
    except ValueError as error:  # a null byte, say
        raise RunDirectoryError(f"--out {str(directory)!r} is no name that a directory can have: {error}") from None
    except OSError as error:
        raise RunError(f"cannot write to {directory}: {error.strerror or error}; choose another --out") from None
    try:
        _put_back_trackers(directory)
        replaces = _settle(directory, resume=resume, overwrite=overwrite)
        remove_leftovers(directory)
    except BaseException:
        _undo(lock, made)
        raise
    return Claim(directory, replaces, resume, lock, made, recipe)


def _undo(lock: FileLock, made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # Windows removes it as it is released
        for path in made:
            if path.name == ".lock":
                path.unlink()
    lock.release()
    with contextlib.suppress(OSError):  # something else has come in there meanwhile
        for path in made:
            if path.name != ".lock":
                path.rmdir()


def _settle(directory: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether the directory holds a run that is to be replaced; raises where it holds what a run may not touch."""
    summary = read_summary(directory)
    status = summary.get("status")
    if resume:
        if status == "finished":
            raise RunDirectoryError(
                f"{directory} holds a finished run: there is nothing to resume; choose another --out, "
                f"or give --overwrite to replace it"
            )
        if not (directory / LAST).exists() and not summary:
            raise RunDirectoryError(f"{directory} holds no run to resume; leave out --resume to start one there")
        return False
    present = {path.name for path in directory.iterdir() if not is_leftover(path)} - {".lock"}
    if not present:
        return False
    # A run writes its summary first and removes it last: without one, files of such names are somebody's own.
    if not summary and ("summary.json" not in present or not present <= {*FILES, *FOLDERS}) and not (directory / LAST).exists():
        raise RunDirectoryError(f"{directory} is not empty and holds no run; choose another --out")
    if not overwrite:
        if status == "finished":
            raise RunDirectoryError(
                f"{directory} already holds a finished run; choose another --out, or give --overwrite to replace it"
            )
        raise RunDirectoryError(
            f"{directory} already holds an unfinished run; go on with --resume, choose another --out, "
            f"or give --overwrite to replace it"
        )
    return True


def remove_run(directory: Path, *, keep: Collection[str] = ()) -> None:
    """Remove what a run has written but `keep`, and nothing else; its summary last, so that half of it is never taken for a run."""
    for name in set(FOLDERS) - set(keep):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (*(name for name in FILES if name != "summary.json"), "summary.json"):
        if name not in keep:
            (directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def trackers_aside(directory: Path) -> Iterator[None]:
    """While new trackers start, those of the earlier run stand aside; they come back where the block raises."""
    if (directory / TRACKERS).exists():
        (directory / TRACKERS).rename(directory / ASIDE)
    try:
        yield
    except BaseException:
        _put_back_trackers(directory)
        raise
    shutil.rmtree(directory / ASIDE, ignore_errors=True)


def _put_back_trackers(directory: Path) -> None:
    """Where trackers have not started, for they raised or their process was killed, the earlier run keeps its own."""
    if (directory / ASIDE).exists():
        shutil.rmtree(directory / TRACKERS, ignore_errors=True)
        (directory / ASIDE).rename(directory / TRACKERS)


def read_summary(directory: Path) -> dict[str, Any]:
    """The run's `summary.json`, or an empty dict where there is none or it cannot be read."""
    try:
        found = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def fresh(recipe: str) -> Path:
    """`runs/<recipe>/<time>`, with a number where that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / recipe / stamp
    directory, number = base, 1
    while directory.exists():
        number += 1
        directory = base.with_name(f"{stamp}-{number}")
    return directory


def newest_unfinished(recipe: str) -> Path:
    folder = Path("runs") / recipe
    candidates = [path.parent.parent for path in folder.glob(f"*/{LAST}")]
    unfinished = [path for path in candidates if read_summary(path).get("status") != "finished"]
    if not unfinished:
        raise RunDirectoryError(f"no unfinished run under {folder}; give the directory with --out, or leave out --resume")
    return max(unfinished, key=lambda path: (path / LAST).stat().st_mtime)
