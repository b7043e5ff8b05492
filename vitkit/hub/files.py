"""The files that go from a run to its Hub repository and back, and their largest sizes."""

import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from uuid import uuid4

from vitkit.data.decode import ImageReadError, read_image
from vitkit.errors import CheckpointError, HubError, RunError, UsageError
from vitkit.files import explain, write_json
from vitkit.hub.secrets import describe_secrets, find_secrets
from vitkit.models.saving import CONFIG, WEIGHTS, check
from vitkit.models.untrusted import JSON_BYTES, read_json
from vitkit.runs.directory import MODULES

MIB = 2**20
CARD, RECIPE, SUMMARY = "README.md", "recipe.py", "summary.json"
ORIGIN = "origin.json"
"""The file that names the repository a directory was pulled from: `vitkit reproduce` does not trust the code in it."""
MAX_BYTES = {
    WEIGHTS: 16 * 2**30,
    CONFIG: JSON_BYTES,
    SUMMARY: JSON_BYTES,
    RECIPE: MIB,
    "metrics.csv": 64 * MIB,
    "losses.csv": 64 * MIB,
    CARD: 4 * MIB,
}
"""The files of a repository that are downloaded, and the most bytes of each; plots and the recipe's modules are added."""
PLOT, PLOT_BYTES = re.compile(r"plots/[\w-]{1,80}\.png"), 16 * MIB
MODULE, MODULE_BYTES = re.compile(rf"{MODULES}/(\w{{1,80}}/){{0,4}}\w{{1,80}}\.py"), MIB
MAX_MORE_FILES = 200
"""Most plots and modules of a repository."""
PNG, MAX_PNG_PIXELS = b"\x89PNG\r\n\x1a\n", 64 * 10**6


def max_bytes(name: str) -> int | None:
    """The largest size of a file of this name; None for a name that no run's repository has."""
    more = PLOT_BYTES if PLOT.fullmatch(name) else MODULE_BYTES if MODULE.fullmatch(name) else None
    return MAX_BYTES.get(name, more)


def run_files(run: Path, *, allow_secrets: bool = False) -> dict[str, int]:
    """The files of a run that are published, with their sizes in bytes; checkpoints and logs are not.

    Raises `UsageError` for a directory without a run, `HubError` for a file that is a link, too large, or, without
    `allow_secrets`, holds what looks like a token or a password.
    """
    if not (run / SUMMARY).exists():
        raise UsageError(f"no run at {run}: it holds no {SUMMARY}; give the directory of a run, such as runs/jepa")
    more = [*(run / "plots").glob("*.png"), *(run / MODULES).rglob("*.py")]
    names = [*(set(MAX_BYTES) - {CARD}), *(path.relative_to(run).as_posix() for path in more)]
    sizes = {}
    for name in sorted(names):
        path, most = run / name, max_bytes(name)
        if any(part.is_symlink() for part in (path, *path.parents) if part.is_relative_to(run) and part != run):
            raise HubError(f"{path} is a link; only a run's own files are published: put a copy in its place")
        if most is None or not path.exists():
            continue
        sizes[name] = path.stat().st_size
        if sizes[name] > most:
            raise HubError(f"{path} has {sizes[name]:,} bytes; {most:,} at most are published")
        if not allow_secrets:
            secrets = find_secrets(_header(path) if name == WEIGHTS else path.read_bytes())
            if secrets:
                raise HubError(describe_secrets(path, secrets))
    return sizes


def _header(path: Path) -> bytes:
    """The header of a safetensors file, with its metadata."""
    with path.open("rb") as file:
        size = file.read(8)
        return file.read(min(struct.unpack("<Q", size)[0], JSON_BYTES)) if len(size) == 8 else b""


def files_to_fetch(repo: str, listing: Mapping[str, int]) -> list[str]:
    """The names in a repository's listing that are downloaded; the other files are left out.

    Raises `HubError` for a repository without a model, with a name outside of it, or with a file that is too large.
    """
    for name in listing:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or ".." in parts or parts[0] == "/" or ":" in parts[0] or "\0" in name:
            raise HubError(f"{repo} names the file {name!r:.80}, which lies outside of it; nothing was fetched")
    missing = [name for name in (CONFIG, WEIGHTS) if name not in listing]
    if missing:
        raise HubError(f"{repo} holds no {' and no '.join(missing)}: it is not a model that vitkit saved")
    names = [name for name in sorted(listing) if max_bytes(name) is not None]
    for name in names:
        most = max_bytes(name) or 0
        if listing[name] > most:
            raise HubError(f"{repo}: {name} has {listing[name]:,} bytes; {most:,} at most are fetched")
    if len(names) > len(MAX_BYTES) + MAX_MORE_FILES:
        raise HubError(f"{repo} has {len(names)} files; a run has at most {len(MAX_BYTES) + MAX_MORE_FILES}")
    return names


def check_fetched(repo: str, folder: Path) -> None:
    """Raise `HubError` unless a folder holds a complete model, readable records and plots that are PNG images."""
    try:
        check(folder)
        if (folder / SUMMARY).exists():
            read_json(folder / SUMMARY)
        for path in sorted((folder / "plots").glob("*")):
            _check_png(path)
    except (CheckpointError, ImageReadError) as error:
        message = str(error).replace(f"{folder}/", "")
        raise HubError(f"{repo} is refused: {message}") from None


def _check_png(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(24)
    if len(start) < 24 or not start.startswith(PNG):
        raise ImageReadError(f"{path} is no PNG image")
    width, height = struct.unpack(">II", start[16:24])
    if width * height > MAX_PNG_PIXELS:
        raise ImageReadError(f"{path} has {width}×{height} pixels; a plot has at most {MAX_PNG_PIXELS:,}")
    try:
        read_image(path)
    except ImageReadError as error:
        raise ImageReadError(f"{path} is no PNG image: {error}") from None


def require_free(out: Path) -> None:
    """Raise `UsageError` unless `out` is free or an empty directory."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out} exists already; choose another directory with -o, or remove it")


def copy_into(repo: str, folder: Path, sizes: Mapping[str, int], out: Path) -> None:
    """Copy downloaded files of these sizes into a new directory: all of them, checked there, or none.

    They are copied into a temporary directory beside `out`, which is then renamed. If two calls run at the same time, one of them
    succeeds. Raises `HubError` for files that are no complete run, `UsageError` if another process has made `out`, `RunError` if
    it cannot be written.
    """
    partial = out.with_name(f".{out.name}.{uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        for name, size in sizes.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
            copied = (partial / name).stat().st_size
            if copied != size:
                raise HubError(f"{repo}: {name} has {copied:,} bytes, expected {size:,}: it was cut short; pull it again")
        check_fetched(repo, partial)
        write_json(partial / ORIGIN, {"repository": repo})
        require_free(out)
        try:
            partial.rename(out)
        except OSError:
            require_free(out)
            out.rmdir()  # some systems do not replace an empty directory
            partial.rename(out)
    except OSError as error:
        raise RunError(explain(out, error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


__all__ = ["CARD", "ORIGIN", "copy_into", "files_to_fetch", "max_bytes", "require_free", "run_files"]
