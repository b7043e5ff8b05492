"""Files that are written whole or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitkit.errors import RunError

_WAYS_OUT = {
    errno.ENOSPC: "free some room, or choose another --out",
    errno.EDQUOT: "free some room, or choose another --out",
    errno.EACCES: "choose a directory that you may write to",
    errno.EROFS: "choose a directory that can be written to",
}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it takes the place of `path` in one step.

    When the block raises, `path` is as it was and nothing is left behind. Raises `RunError` where the file
    cannot be written, with what to do.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes only what may be written to
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_directory(path.parent)
        temporary = None
    except OSError as error:
        raise RunError(explain(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file is one that `atomic_write` could not finish, for its process was killed."""
    return path.name.startswith(".") and path.suffix == ".partial"


def remove_leftovers(directory: Path) -> None:
    """Remove the unfinished files of killed processes in a directory and below; nobody else may be writing there."""
    for path in directory.rglob(".*.partial"):
        path.unlink(missing_ok=True)


def explain(path: Path, error: OSError) -> str:
    """`cannot write PATH: No space left on device; free some room, ...`."""
    way = _WAYS_OUT.get(error.errno or 0, "nothing was left half-written")
    return f"cannot write {path}: {error.strerror or error}; {way}"


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """Make the new name last through a power failure, where directories can be opened (not on Windows)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
