"""Known vulnerabilities of the libraries that vitkit uses, if an untrusted file or another user can exploit them.

`vitkit doctor` warns of them. Each row names its source, so that it can be checked.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vitkit.errors import shell_command


@dataclass(frozen=True)
class Vulnerability:
    """A vulnerability of all versions of `distribution` before `fixed`: its `effect`, and the `source` that published it."""

    distribution: str
    fixed: str
    effect: str
    source: str


VULNERABILITIES = (
    Vulnerability("torch", "2.6.0", "torch.load runs code from a file, with weights_only=True too", "CVE-2025-32434"),
    Vulnerability("timm", "1.0.26", "a model argument `checkpoint_path` unpickles a file, which can run code", "timm 1.0.26 release notes"),
    Vulnerability(
        "pillow", "13.0.0", "an image can overflow a buffer while it is decoded", "CVE-2026-96639, GHSA-5x8w-8jj5-q52h",
    ),
    Vulnerability(
        "filelock", "3.20.3", "another user of this machine can redirect a lock file by a link", "CVE-2025-68146, CVE-2026-22701",
    ),
)  # fmt: skip


def known_vulnerabilities(version_of: Callable[[str], str | None]) -> list[str]:
    """A line for each vulnerability of an installed version; `version_of` gives the version of a distribution, or None."""
    lines = []
    for vulnerability in VULNERABILITIES:
        name = vulnerability.distribution
        version = version_of(name)
        if version is not None and _release(version) < _release(vulnerability.fixed):
            command = shell_command("pip", "install", f"{name}>={vulnerability.fixed}")
            lines.append(f"{name} {version} has a known vulnerability: {vulnerability.effect} ({vulnerability.source}); {command}")
    return lines


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version without its suffix: "2.6.0+cu124" → (2, 6, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()


__all__ = ["VULNERABILITIES", "Vulnerability", "known_vulnerabilities"]
