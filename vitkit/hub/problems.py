"""Errors of the Hub's client as messages that say what to do. Messages never contain access tokens."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vitkit.errors import HubError, VitkitError, printable

CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""The HTTP libraries of the supported versions of huggingface_hub: errors of these modules concern the connection."""
TOKENS = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again: files that have arrived are not transferred twice"
_CASES: dict[type[BaseException], str] = {
    LocalTokenNotFoundError: f"no access token for the Hub: make one that may write at {TOKENS}, then `hf auth login`, "
    f"or set HF_TOKEN",
    GatedRepoError: "{repo} is gated: ask for access on its page, and log in with `hf auth login`",
    RepositoryNotFoundError: "there is no repository {repo} on the Hub, or it is private and your token may not see it: "
    "check the name (or the directory, if you meant one), and log in with `hf auth login`",
    RevisionNotFoundError: "{repo} has no branch, tag or commit {revision!r}; its page lists them",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE forbids reaching the Hub, and {repo} is not in the Hub cache: unset it, or load "
    "it once with a network",
}


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Within this block errors of the Hub's client become `HubError`; other errors pass."""
    try:
        yield
    except VitkitError:
        raise
    except Exception as error:
        message = _message(repo, revision, error)
        if message is None:
            raise
        raise HubError(_redacted(message)) from None


def is_connection(error: BaseException) -> bool:
    """Whether an error concerns the connection: no answer came, or none was allowed."""
    if isinstance(error, ConnectionError | TimeoutError):  # the Xet client raises Python's own
        return True
    return _module(error) in CLIENTS and _status(error) is None


def _message(repo: str, revision: str | None, error: Exception) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        for kind, text in _CASES.items():
            if isinstance(cause, kind):
                return text.format(repo=repo, revision=revision)
        status = 403 if isinstance(cause, PermissionError) and _module(cause) == "hf_xet" else _status(cause)
        if status is not None:
            return _refused(repo, status, getattr(cause, "server_message", None) or "")
        if is_connection(cause):
            cause_text = printable(f"{type(cause).__name__}: {cause}".rstrip(": "), 200)
            return f"the connection to {HfApi().endpoint} for {repo} failed ({cause_text}); check the network and {AGAIN}"
        cause = cause.__cause__ or cause.__context__
    return None


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error concerns, or None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _refused(repo: str, status: int, answer: str) -> str:
    reason = f" ({printable(' '.join(answer.split()))})" if answer else ""
    messages = {
        401: f"the Hub does not accept your access token: it is invalid or has expired{reason}; make another at {TOKENS}, "
        f"then `hf auth login`, or set HF_TOKEN",
        403: f"your access token does not permit access to {repo}{reason}: log in as its owner, take a token that may write "
        f"({TOKENS}), push under your own name, or propose it with --create-pr",
        409: f"{repo} was changed by another push{reason}; {AGAIN}",
        413: f"{repo} is too large for the Hub{reason}",
        429: f"the Hub asks to slow down{reason}; wait a few minutes and {AGAIN}",
    }
    if status >= 500:
        return f"the Hub has an internal error: {status}{reason}; wait a little and {AGAIN}"
    return messages.get(status, f"the Hub refused {repo}: {status}{reason}")


def _module(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _redacted(text: str) -> str:
    token = get_token()
    text = text.replace(token, "***") if token else text
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text)


__all__ = ["explained", "is_connection"]
