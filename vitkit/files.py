"""Atomic file writes, the rule for output files that exist already, and the header of safetensors files."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitkit.errors import RunError, UsageError, printable

_SOLUTIONS = {
    errno.ENOSPC: "free some room, or choose another --out",
    errno.EDQUOT: "free some room, or choose another --out",
    errno.EACCES: "choose a directory that you may write to",
    errno.EROFS: "choose a directory that can be written to",
}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an exception, it replaces `path` in one step.

    When the block raises, `path` is unchanged and no temporary file is left. A file that is replaced keeps its permissions; a new
    file gets those of the umask. A symbolic link is replaced and never followed. Raises `RunError` if the file cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode(path)
        temporary = _create(path, 0o666 if mode is None else 0o600)
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes only files that are open for writing
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
        _sync_directory(path.parent)
        temporary = None
    except OSError as error:
        raise RunError(explain(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _mode(path: Path) -> int | None:
    """The permissions of a regular file, None if there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


def _create(path: Path, mode: int) -> Path:
    """A new empty file beside `path`. The system applies the umask, so that it is neither read nor changed here."""
    while True:
        temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.partial")
        try:
            os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode))
        except FileExistsError:
            continue
        return temporary


def is_leftover(path: Path) -> bool:
    """Whether `path` is named as the unfinished file of an `atomic_write` whose process was killed."""
    return path.name.startswith(".") and path.suffix == ".partial"


def remove_leftovers(directory: Path) -> None:
    """Remove the unfinished files of killed processes in a directory and below; no other process may write there."""
    for path in directory.rglob(".*.partial"):
        path.unlink(missing_ok=True)


def check_output(
    path: Path, *, overwrite: bool, is_ours: Callable[[Path], bool], kind: str, option: str = "-o"
) -> None:
    """Check an output file before the work begins: a file is replaced only on request, and only if the command wrote it.

    `is_ours` tells whether an existing file is an earlier output of the same command, `kind` names such a file ("a file of
    scores"). Raises `UsageError` for a directory, for an existing file without `overwrite`, and for a file that is not ours.
    """
    if path.is_dir():
        raise UsageError(f"{option} {printable(path)} is a directory; expected the name of {kind}")
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise UsageError(f"{option} {printable(path)} exists already; choose another name, or give --overwrite")
    if path.is_symlink() or not is_ours(path):
        raise UsageError(
            f"{option} {printable(path)} exists and is not {kind}, so it is not replaced; choose another name"
        )


def explain(path: Path, error: OSError) -> str:
    """`cannot write PATH: No space left on device; free some room, ...`."""
    solution = _SOLUTIONS.get(error.errno or 0, "no incomplete file was left")
    return f"cannot write {printable(path)}: {error.strerror or error}; {solution}"


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 in one step; undecodable bytes of file names become escapes such as `\\udce9`, also valid in JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON in one step; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file whose tensors follow in this order: their name, dtype ("F32"), shape and number of bytes.

    It is the length of the JSON text in 8 bytes, then the text, padded to a multiple of 8. Files that are written with it need no
    copy of their tensors in memory, which the writer of safetensors makes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _sync_directory(directory: Path) -> None:
    """Let the new name survive a power failure, where directories can be opened (not on Windows)."""
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
