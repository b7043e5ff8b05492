"""Access tokens and passwords in files that are about to be published."""

import re
from dataclasses import dataclass
from pathlib import Path

from vitkit.errors import printable

PATTERNS = {
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "a GitLab token": rb"\bglpat-[\w-]{20,}",
    "an OpenAI or Anthropic key": rb"\bsk-(?=[\w-]*\d)[A-Za-z0-9_-]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|aws_secret_access_key\W{1,5}[A-Za-z0-9/+=]{30,}",
    "a Slack token": rb"\bxox[a-z]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/[\w/]{20,}",
    "a Google key": rb"\bAIza[\w-]{35}",
    "a package index token": rb"\b(?:pypi-AgE|npm_)[\w-]{20,}",
    "a web token": rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
    "credentials of a request": rb"(?i)\bauthorization\W{1,6}(?:bearer|basic|token)\s+[\w.~+/=-]{8,}|\bbearer\s+[\w.~+/=-]{20,}",
    "credentials in an address": rb"\b[A-Za-z][\w+.-]{1,20}://(?:[^\s/:@'\"<>{}]{0,100}:[^\s/@'\"<>{}]{1,200}|[\w-]{20,200})@",
    "a token in an address": rb"(?i)[?&](?:\w{0,20}token|api_?key|secret|signature|x-amz-signature|sig)=[\w.%~+-]{12,}",
    "a password or key": rb"(?i)(?:api_?key|secret(?:_key)?|token|passw(?:or)?d)['\"]?\s*[:=]\s*['\"](?!https?:)[^\s'\"]{12,200}['\"]",
    "a password or key of a command": rb"(?i)--(?:[\w-]{0,20}(?:api-?key|secret|token|password))[= ]\s{0,3}['\"]?[^\s'\"-][^\s'\"]{7,}",
}
_ANY = re.compile(b"|".join(re.sub(rb"^\(\?i\)(.*)$", rb"(?i:\1)", pattern) for pattern in PATTERNS.values()))


@dataclass(frozen=True)
class Secret:
    """A text that looks like a secret: its kind, its line counted from 1, and its first characters."""

    kind: str
    line: int
    start: str


def find_secrets(content: bytes) -> list[Secret]:
    """The texts in a file's content that look like a token, a key or a password, in order."""
    secrets = []
    for match in _ANY.finditer(content):
        kind = next(kind for kind, pattern in PATTERNS.items() if re.search(pattern, match[0]))
        start = printable(match[0][: min(6, len(match[0]) // 2)].decode("utf-8", "replace"))
        secrets.append(Secret(kind, content.count(b"\n", 0, match.start()) + 1, start))
    return secrets


def describe_secrets(path: Path, secrets: list[Secret]) -> str:
    """The refusal to publish a file, with the place of its first secret; the secret itself is not repeated."""
    first, more = secrets[0], f" and {len(secrets) - 1} more" if len(secrets) > 1 else ""
    noun = "a password" if "password" in first.kind or "credentials" in first.kind else "an access token"
    return (
        f"{printable(path)} holds what looks like {noun}; take it out (and revoke it) before publishing: line {first.line}, "
        f"{first.kind}, {first.start}***{more}. If it is no secret, push with --allow-secrets (allow_secrets=True)"
    )


__all__ = ["Secret", "describe_secrets", "find_secrets"]
