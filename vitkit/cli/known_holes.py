"""Security holes in versions of the libraries that vitkit uses, as far as a file from a stranger can reach them.

`vitkit doctor` warns of them. Each row names its source, so that it can be checked.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vitkit.errors import shell_command


@dataclass(frozen=True)
class Hole:
    """All versions of `distribution` before `fixed` have a hole: `effect` says what can happen, `source` where that is published."""

    distribution: str
    fixed: str
    effect: str
    source: str


HOLES = (
    Hole("torch", "2.6.0", "torch.load runs code from a file, with weights_only=True too", "CVE-2025-32434"),
    Hole("timm", "1.0.26", "a model argument `checkpoint_path` unpickles a file, which can run code", "timm 1.0.26 release notes"),
    Hole(
        "pillow", "13.0.0", "an image can overflow a buffer while it is decoded", "CVE-2026-96639, GHSA-5x8w-8jj5-q52h",
    ),
    Hole("filelock", "3.20.3", "another user of this machine can redirect a lock file by a link", "CVE-2025-68146, CVE-2026-22701"),
)  # fmt: skip


def known_holes(version_of: Callable[[str], str | None]) -> list[str]:
    """A line for each hole in an installed version; `version_of` gives the version of a distribution, or None."""
    lines = []
    for hole in HOLES:
        version = version_of(hole.distribution)
        if version is not None and _release(version) < _release(hole.fixed):
            command = shell_command("pip", "install", f"{hole.distribution}>={hole.fixed}")
            lines.append(f"{hole.distribution} {version} has a known security hole: {hole.effect} ({hole.source}); {command}")
    return lines


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version without its suffix: "2.6.0+cu124" → (2, 6, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()


__all__ = ["HOLES", "Hole", "known_holes"]
