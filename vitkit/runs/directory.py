"""A run's directory: one process at a time holds it, and a run in it is replaced only when the caller asks for that.

A run is replaced in steps that a kill at any moment leaves repairable. The files of the earlier run move into
`.vitkit-replaced/`, the new summary is written, and then that folder becomes `.vitkit-removed/`: from this rename on the
directory belongs to the new run. The next `claim` completes the work of a killed process: it moves the files in the first
folder back, and deletes the second one.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vitkit.errors import LINE_CHARACTERS, RunDirectoryError, RunError, printable
from vitkit.files import atomic_write, is_leftover, remove_leftovers, write_json

FILES = (
    "metrics.csv", "losses.csv", "summary.json", "model.safetensors", "config.json", "report.html", "recipe.py", "log.txt",
)  # fmt: skip
TRACKERS = "trackers"
MODULES = "modules"
"""Copies of the modules that the recipe imports from its own folder."""
FOLDERS = ("checkpoints", "plots", TRACKERS, MODULES)
LAST = Path("checkpoints/last.safetensors")
BEST = Path("checkpoints/best.safetensors")
LOCK, REPLACED, REMOVED = ".lock", ".vitkit-replaced", ".vitkit-removed"
LOCK_SECONDS = 0.25
"""Time that a run waits for the lock: a reader that looks whether the run is alive holds it for an instant."""


@dataclass
class Claim:
    """A run's directory, held until the process ends; nothing in it changes before `open`.

    - `replaces`: the directory holds an earlier run, which stays until `open` puts the new one in its place.
    - `resumes`: the earlier run in the directory continues.
    - `recipe`: the source code that the run keeps a copy of.
    """

    directory: Path
    replaces: bool
    resumes: bool
    lock: FileLock
    made: list[Path]
    recipe: bytes | None = None
    opened: bool = False
    _lines: list[str] = field(default_factory=list)

    @property
    def keeps_earlier(self) -> bool:
        """True until this run has written to an existing run's directory."""
        return not self.opened and (self.resumes or self.replaces)

    def open(self, summary: Mapping[str, Any], *, keep: Collection[str] = ()) -> None:
        """Make the directory this run's: write the summary, the recipe and the lines noted so far. Later calls do nothing.

        An earlier run that is replaced disappears except for the names in `keep`. If the summary cannot be written, the
        earlier run stays complete.
        """
        if self.opened:
            return
        try:
            if self.replaces:
                _move_aside(self.directory, [name for name in (*FILES, *FOLDERS) if name not in keep])
            write_json(self.directory / "summary.json", summary)
            if self.replaces:
                (self.directory / REPLACED).rename(self.directory / REMOVED)
        except BaseException:
            _complete_replacement(self.directory)
            raise
        self.opened = True
        if self.recipe is not None:
            with atomic_write(self.directory / "recipe.py") as temporary:
                temporary.write_bytes(self.recipe)
        lines, self._lines = self._lines, []
        self._log(lines)
        shutil.rmtree(self.directory / REMOVED, ignore_errors=True)

    def note(self, text: str, *details: str) -> None:
        """Add a line to `log.txt`, and indented lines of details below it, at once or with `open`."""
        line = f"{time.strftime('%H:%M:%S')} {printable(text, LINE_CHARACTERS)}\n"
        line += "".join(f"  {printable(detail, LINE_CHARACTERS)}\n" for detail in details)
        if self.opened or self.resumes:
            self._log([line])
        else:
            self._lines.append(line)

    def release(self) -> None:
        """Let other processes use the directory. If this run wrote nothing, its lock file and the folders made for it disappear."""
        if self.opened:
            self.lock.release()
        else:
            _undo(self.lock, self.made)

    def _log(self, lines: list[str]) -> None:
        path = self.directory / "log.txt"
        with contextlib.suppress(OSError):
            if path.is_symlink():  # a link may lead to a file of another user
                path.unlink()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            with open(os.open(path, flags, 0o666), "a", encoding="utf-8", newline="\n") as log:
                log.writelines(lines)


def claim(out: Path | None, name: str, *, recipe: bytes | None = None, resume: bool, overwrite: bool) -> Claim:
    """Hold the directory of a run; a refusal leaves it unchanged.

    Without `out` it is a new `runs/<name>/<time>`, or with `resume` the newest unfinished run there. Raises
    `RunDirectoryError` if another process holds it, if it holds a run and neither `resume` nor `overwrite` is given, or if
    there is nothing to resume; `RunError` if it cannot be written.
    """
    directory = out or (newest_unfinished(name) if resume else None)
    if directory is not None and directory.exists() and not directory.is_dir():
        raise RunDirectoryError(f"--out {directory} is a file; a run needs a directory")
    made: list[Path] = []
    try:
        directory = directory or Path("runs", name)
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        if out is None and not resume:
            directory = fresh(name)
            made.insert(0, directory)
        directory.mkdir(parents=True, exist_ok=True)
        made = [directory / LOCK, *made] if not (directory / LOCK).exists() else made
        lock = FileLock(directory / LOCK)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise RunDirectoryError(
            f"{directory} is in use by another process; wait until it ends, or choose another --out"
        ) from None
    except ValueError as error:  # a null byte, for example
        raise RunDirectoryError(f"--out {str(directory)!r} is not a valid name of a directory: {error}") from None
    except OSError as error:
        raise RunError(f"cannot write to {directory}: {error.strerror or error}; choose another --out") from None
    try:
        _complete_replacement(directory)
        for name in (REPLACED, REMOVED):
            if os.path.lexists(directory / name):
                raise RunDirectoryError(f"{directory / name} holds files that no run wrote; move them away, or choose another --out")
        replaces = _replaces(directory, resume=resume, overwrite=overwrite)
        remove_leftovers(directory)
    except BaseException:
        _undo(lock, made)
        raise
    return Claim(directory, replaces, resume, lock, made, recipe)


def _undo(lock: FileLock, made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # Windows removes the file when the lock is released
        for path in made:
            if path.name == LOCK:
                path.unlink()
    lock.release()
    with contextlib.suppress(OSError):  # another process may have written into one of them
        for path in made:
            if path.name != LOCK:
                path.rmdir()


def _replaces(directory: Path, *, resume: bool, overwrite: bool) -> bool:
    """True if the directory holds a run that the new one replaces; raises if a run must not start there."""
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
    present = {path.name for path in directory.iterdir() if not is_leftover(path)} - {LOCK}
    if not present:
        return False
    # A run writes its summary first: without a summary, the files are not those of a run.
    if not summary and ("summary.json" not in present or not present <= {*FILES, *FOLDERS}) and not (directory / LAST).exists():
        raise RunDirectoryError(f"{directory} is not empty and holds no run; choose another --out")
    if not overwrite:
        if status == "finished":
            raise RunDirectoryError(
                f"{directory} already holds a finished run; choose another --out, or give --overwrite to replace it"
            )
        raise RunDirectoryError(
            f"{directory} already holds an unfinished run; give --resume to resume it, choose another --out, "
            f"or give --overwrite to replace it"
        )
    return True


@contextlib.contextmanager
def trackers_aside(directory: Path) -> Iterator[None]:
    """Move the earlier run's trackers aside while new ones start; they come back if the block raises."""
    _move_aside(directory, [TRACKERS])
    try:
        yield
    except BaseException:
        _complete_replacement(directory)
        raise


def _move_aside(directory: Path, names: Collection[str]) -> None:
    """Move files and folders of the earlier run into `.vitkit-replaced`.

    If the earlier run had no trackers or no summary, an empty folder or file takes their place there.
    """
    aside = directory / REPLACED
    aside.mkdir(exist_ok=True)
    for name in names:
        if os.path.lexists(directory / name):
            (directory / name).rename(aside / name)
        elif name == TRACKERS:
            (aside / name).mkdir()
        elif name == "summary.json":
            (aside / name).touch()


def _complete_replacement(directory: Path) -> None:
    """Undo a replacement that stopped before the new run's summary was in place, and finish one that stopped after it."""
    aside = directory / REPLACED
    if aside.is_dir() and _names(aside) <= {*FILES, *FOLDERS}:
        for name in (*FILES, *FOLDERS):
            if not os.path.lexists(aside / name):
                continue
            _remove(directory / name)
            if name not in ("summary.json", TRACKERS) or not _is_empty(aside / name):
                (aside / name).rename(directory / name)
            else:
                _remove(aside / name)
        aside.rmdir()
    if _names(directory / REMOVED) <= {*FILES, *FOLDERS}:
        shutil.rmtree(directory / REMOVED, ignore_errors=True)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_summary(directory: Path) -> dict[str, Any]:
    """The run's `summary.json`, or an empty dict if there is none or it cannot be read."""
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def status_of(directory: Path, summary: Mapping[str, Any]) -> str:
    """The status of a run for a reader: `stopped` if the summary says `running` and no process holds the directory."""
    status = str(summary.get("status") or "unknown")
    return "stopped" if status == "running" and not _is_held(directory) else status


def _is_held(directory: Path) -> bool:
    """True if a process holds the directory, or if this cannot be found out."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except (Timeout, OSError, NotImplementedError):
        return True


def fresh(recipe: str) -> Path:
    """Make the directory `runs/<recipe>/<time>`, with a number where another process has taken that name."""
    folder, stamp, number = Path("runs") / recipe, time.strftime("%Y%m%d-%H%M%S"), 1
    folder.mkdir(parents=True, exist_ok=True)
    directory = folder / stamp
    while True:
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            number += 1
            directory = folder / f"{stamp}-{number}"


def newest_unfinished(recipe: str) -> Path:
    """The directory of the unfinished run under `runs/<recipe>` whose checkpoint is the newest."""
    folder = Path("runs") / recipe
    candidates = [path.parent.parent for path in folder.glob(f"*/{LAST}")]
    unfinished = [path for path in candidates if read_summary(path).get("status") != "finished"]
    if not unfinished:
        raise RunDirectoryError(f"no unfinished run under {folder}; give the directory with --out, or leave out --resume")
    return max(unfinished, key=lambda path: (path / LAST).stat().st_mtime)
