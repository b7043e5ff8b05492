"""Which files go from a run to its Hub repository and back, and how large they may be."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vitkit.errors import CheckpointError, HubError, RunError, UsageError
from vitkit.files import explain
from vitkit.models.saving import CONFIG, WEIGHTS, check
from vitkit.models.untrusted import JSON_BYTES, read_json

MIB = 2**20
CARD, RECIPE, SUMMARY = "README.md", "recipe.py", "summary.json"
MOST_BYTES = {
    WEIGHTS: 16 * 2**30,
    CONFIG: JSON_BYTES,
    SUMMARY: JSON_BYTES,
    RECIPE: MIB,
    "metrics.csv": 64 * MIB,
    "losses.csv": 64 * MIB,
    CARD: 4 * MIB,
}
"""The files of a repository that are fetched, and the most bytes each may have; `plots/*.png` besides."""
PLOT, PLOT_BYTES, MOST_PLOTS = re.compile(r"plots/[\w-]{1,80}\.png"), 16 * MIB, 200
TEXTS = (".py", ".json", ".csv")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def most_bytes(name: str) -> int | None:
    """How large a file of this name may be; None for a name that no run's repository has."""
    return PLOT_BYTES if PLOT.fullmatch(name) else MOST_BYTES.get(name)


def of_run(run: Path) -> dict[str, int]:
    """The files of a run that are published, with their sizes; checkpoints, logs and what is not a run's stay behind.

    Raises `UsageError` for a directory without a run, `HubError` for a file that is a link, too large, or holds what
    looks like a token.
    """
    if not (run / SUMMARY).exists():
        raise UsageError(f"no run at {run}: it holds no {SUMMARY}; give the directory of a run, such as runs/jepa")
    names = [*(set(MOST_BYTES) - {CARD}), *(f"plots/{path.name}" for path in (run / "plots").glob("*.png"))]
    sizes = {}
    for name in sorted(names):
        path, most = run / name, most_bytes(name)
        if path.is_symlink() or path.parent.is_symlink():
            raise HubError(f"{path} is a link; only a run's own files are published: put a copy in its place")
        if most is None or not path.exists():
            continue
        sizes[name] = path.stat().st_size
        if sizes[name] > most:
            raise HubError(f"{path} has {sizes[name]:,} bytes; {most:,} at most are published")
        if path.suffix in TEXTS and TOKEN.search(path.read_bytes()):
            raise HubError(
                f"{path} holds what looks like an access token; take it out (and revoke it) before publishing"
            )
    return sizes


def to_fetch(repo: str, listing: Mapping[str, int]) -> list[str]:
    """The names in a repository's listing that are fetched; others are left where they are.

    Raises `HubError` for a repository that holds no model, names a file outside of itself, or one that is too large.
    """
    for name in listing:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or ".." in parts or parts[0] == "/" or ":" in parts[0] or "\0" in name:
            raise HubError(f"{repo} names the file {name!r:.80}, which lies outside of it; nothing was fetched")
    lacks = [name for name in (CONFIG, WEIGHTS) if name not in listing]
    if lacks:
        raise HubError(f"{repo} holds no {' and no '.join(lacks)}: it is no model that vitkit has saved")
    names = [name for name in sorted(listing) if most_bytes(name) is not None]
    for name in names:
        most = most_bytes(name) or 0
        if listing[name] > most:
            raise HubError(f"{repo}: {name} has {listing[name]:,} bytes; {most:,} at most are fetched")
    if len(names) > len(MOST_BYTES) + MOST_PLOTS:
        raise HubError(f"{repo} has {len(names)} files; a run has at most {len(MOST_BYTES) + MOST_PLOTS}")
    return names


def check_fetched(repo: str, folder: Path) -> None:
    """That what was fetched is a whole model with the records of a run; `HubError` says what is not."""
    try:
        check(folder)
        if (folder / SUMMARY).exists():
            read_json(folder / SUMMARY)
    except CheckpointError as error:
        raise HubError(f"{repo} is refused: {error}") from None


def require_free(out: Path) -> None:
    """Raise `UsageError` where something other than an empty directory is there."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out} is there already; choose another directory with -o, or remove it")


def copy_into(folder: Path, names: list[str], out: Path) -> None:
    """Copy fetched files into a directory that is not there yet: all of them, or none; `RunError` where it cannot be."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)  # refuses a link that somebody has put there
        for name in names:
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise RunError(explain(out, error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


__all__ = ["CARD", "check_fetched", "copy_into", "most_bytes", "of_run", "require_free", "to_fetch"]
