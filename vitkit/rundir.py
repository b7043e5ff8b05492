"""A run's directory: claimed by one process at a time, and never overwritten silently."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vitkit.errors import RunDirectoryError, RunError
from vitkit.files import is_leftover, remove_leftovers

FILES = (
    "metrics.csv", "losses.csv", "summary.json", "model.safetensors", "config.json", "report.html", "recipe.py", "log.txt",
)  # fmt: skip
FOLDERS = ("checkpoints", "plots", "trackers")
LAST = Path("checkpoints/last.safetensors")
BEST = Path("checkpoints/best.safetensors")


def claim(out: Path | None, recipe: str, *, resume: bool, overwrite: bool) -> tuple[Path, FileLock]:
    """The directory of a run and the lock that holds it until the process ends.

    Without `out` it is `runs/<recipe>/<time>`, or with `resume` the newest unfinished run there. Raises
    `RunDirectoryError` where another process holds it, where it holds a run and neither `resume` nor `overwrite`
    says what to do, or where there is nothing to resume; `RunError` where it cannot be written.
    """
    if resume and overwrite:
        raise RunDirectoryError("--resume goes on with a run and --overwrite discards it; give one of the two")
    directory = out or (newest_unfinished(recipe) if resume else fresh(recipe))
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(f"--out {directory} is a file; a run needs a directory")
    try:
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
        _settle(directory, resume=resume, overwrite=overwrite)
        remove_leftovers(directory)
    except BaseException:
        lock.release()
        raise
    return directory, lock


def _settle(directory: Path, *, resume: bool, overwrite: bool) -> None:
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
        return
    present = {path.name for path in directory.iterdir() if not is_leftover(path)} - {".lock"}
    if present <= {"recipe.py", "log.txt"}:  # killed before it had written down its flags: there is nothing to go on with
        return
    if not summary and not present <= {*FILES, *FOLDERS}:
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
    remove_run(directory)


def remove_run(directory: Path) -> None:
    """Remove what a run has written, and nothing else; its summary last, so that half of it is never taken for a run."""
    for name in FOLDERS:
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (*(name for name in FILES if name != "summary.json"), "summary.json"):
        (directory / name).unlink(missing_ok=True)


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
