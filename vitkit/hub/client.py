"""Runs as repositories of the Hugging Face Hub: push, pull, load. Nothing that comes from one is executed.

The one file that imports huggingface_hub.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from vitkit.errors import CheckpointError, HubError, UsageError, VitkitError, nearest
from vitkit.hub.files import CARD, check_fetched, copy_into, most_bytes, of_run, require_free, to_fetch
from vitkit.hub.model_card import Card, is_unedited, sealed
from vitkit.models import saving
from vitkit.models.model import Model
from vitkit.models.saving import CONFIG, WEIGHTS
from vitkit.models.untrusted import read_json
from vitkit.registry import version_of

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""The HTTP libraries of the supported versions of huggingface_hub: their errors are of the connection."""
TOKENS = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again: what has arrived is not transferred twice"


@dataclass(frozen=True)
class Plan:
    """What a push would send: the repository, the run's files with their sizes, and the card."""

    repo: str
    run: Path
    files: dict[str, int]
    card: str


@dataclass(frozen=True)
class Pushed:
    """What a push did: the page of the commit or the pull request, and what it left alone."""

    repo: str
    url: str
    card_kept: bool
    unchanged: bool


def plan(run: str | Path, name: str, *, licence: str = "apache-2.0") -> Plan:
    """What `push` would send, without touching the network; without an owner in `name` the card says OWNER.

    Raises as `push` does for what is wrong on this side.
    """
    run = Path(run)
    repo = _repo_id(name if "/" in name else f"OWNER/{name}")
    files = of_run(run)
    plots = [file for file in files if file.startswith("plots/")]
    card = Card(run, repo, saving.check(run), plots, licence)
    results = [EvalResult(**result) for result in card.results] or None
    data = ModelCardData(**card.metadata, eval_results=results, model_name=repo.rpartition("/")[2] if results else None)
    return Plan(repo, run, files, sealed(f"---\n{data.to_yaml()}\n---\n\n{card.body}"))


def push(
    run: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    licence: str = "apache-2.0",
) -> Pushed:
    """Publish a run as `[OWNER/]NAME` in one commit: model, recipe, metrics, plots and a card written from the run.

    `private` makes a new repository private, `revision` names a branch (made where it is missing), `create_pr` proposes
    the commit instead. A card that a person has edited stays. Raises `UsageError` for a name or a run that cannot be,
    `CheckpointError` for a damaged model, `HubError` for everything that the Hub or the network refuses.
    """
    ready = plan(run, name, licence=licence)  # what is wrong on this side is said before anything is sent
    with _explained(name):
        api = _api()
        owner = api.whoami()["name"]
    repo = name if "/" in name else f"{owner}/{name}"
    if repo != ready.repo:
        ready = plan(run, repo, licence=licence)
    with _explained(repo, revision):
        _make_ready(api, repo, private=private, revision=revision, create_pr=create_pr)
        info = api.model_info(repo, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        kept = CARD in there and not is_unedited(_text(api, repo, CARD, info.sha))
        files = [CommitOperationAdd(file, str(ready.run / file)) for file in ready.files]
        card = [] if kept else [CommitOperationAdd(CARD, ready.card.encode())]
        stale = [file for file in there - set(ready.files) - {CARD} if most_bytes(file) and "/" not in file]
        commit = api.create_commit(
            repo,
            [*files, *card, *(CommitOperationDelete(file) for file in sorted(stale))],
            commit_message=message or f"Run {ready.run.resolve().name} with vitkit {version_of('vitkit')}",
            revision=revision,
            create_pr=create_pr,
        )
    url = commit.pr_url if create_pr and commit.pr_url else f"{api.endpoint}/{repo}"
    if revision and not create_pr:
        url += f"/tree/{revision}"
    return Pushed(repo, url, kept, unchanged=commit.oid == info.sha)


def pull(repo: str, out: str | Path | None = None, *, revision: str | None = None) -> tuple[Path, list[str]]:
    """Copy a repository's run into `out` (default: a directory of its name); the directory and what was left out.

    Only the files of a run are taken, of bounded size, and only when the model is whole; the directory is written
    whole or not at all. Raises `UsageError` where it is there already, `HubError` for what the Hub refuses or is refused.
    """
    _repo_id(repo)
    out = Path(out or repo.rpartition("/")[2])
    require_free(out)
    folder, names, others = _snapshot(repo, revision, model_alone=False)
    check_fetched(repo, folder)
    copy_into(folder, names, out)
    return out, others


def resolve(source: str | Path, *, revision: str | None = None, model_alone: bool = True) -> Path:
    """The directory of a saved model: `source` itself, or where it is `OWNER/NAME` the Hub cache's copy of it.

    Without `model_alone` the copy holds the records and the recipe of its run too. Without a network, or with
    `HF_HUB_OFFLINE=1`, it is the copy that was fetched before. Raises `HubError`.
    """
    if not is_repo(source):
        if revision is not None:
            raise UsageError(f"revision {revision!r} is of a Hub repository OWNER/NAME; {source} is a directory")
        return Path(source)
    try:
        return _snapshot(str(source), revision, model_alone=model_alone)[0]
    except HubError as error:
        beside = [str(path) for path in Path(source).parent.glob("*") if path.is_dir()]  # a directory was meant, perhaps
        hint = nearest(str(source), beside)
        looked = f"{hint} It" if hint else ", so it"
        raise HubError(f"there is no directory {source}{looked} was looked for on the Hub: {error}") from None


def fetch_run(repo: str, *, revision: str | None = None) -> Path:
    """The Hub cache's copy of a repository `OWNER/NAME`: its model, records and recipe. A local directory of that name is ignored.

    Raises `UsageError` for any other name, and `HubError`.
    """
    folder, _, _ = _snapshot(_repo_id(repo), revision, model_alone=False)
    return folder


def load(source: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu") -> Model:
    """Rebuild a saved model from a directory or a Hub repository `OWNER/NAME`, in evaluation mode.

    A directory of that name goes before a repository. Nothing from either is executed: only registered backbones,
    heads and losses are built, and tensors are read from safetensors. Raises `HubError`, and `CheckpointError` and
    `VersionWarning` as `vitkit.models.saving.load`.
    """
    return saving.load(resolve(source, revision=revision), device=device)


def is_repo(source: str | Path) -> bool:
    """Whether a model's source names a Hub repository: a string `OWNER/NAME` where no such directory is."""
    return isinstance(source, str) and REPO.fullmatch(source) is not None and not Path(source).exists()


def _api() -> HfApi:
    return HfApi(library_name="vitkit", library_version=version_of("vitkit"))


def _repo_id(name: str) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{name!r} is no name of a Hub repository, which is OWNER/NAME: {error}") from None
    if not REPO.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a Hub repository; expected OWNER/NAME")
    return name


def _make_ready(api: HfApi, repo: str, *, private: bool, revision: str | None, create_pr: bool) -> None:
    """Make the repository and the branch where they are missing; refuse what somebody would be sorry for."""
    try:
        info = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        if create_pr:
            raise
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo, files_metadata=True)
    if private and not info.private:
        raise HubError(
            f"{repo} is there and public, --private is for a new repository: make it private in its settings "
            f"({api.endpoint}/{repo}/settings), or choose another name"
        )
    names = {sibling.rfilename for sibling in info.siblings or []} - {".gitattributes", CARD, "LICENSE"}
    if names and not _is_ours(api, repo, names, info.sha):
        raise HubError(
            f"the name {repo} is taken by a repository that vitkit did not save ({', '.join(sorted(names)[:4])}); "
            f"choose another name"
        )
    if revision and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _is_ours(api: HfApi, repo: str, names: set[str], revision: str | None) -> bool:
    if CONFIG not in names:
        return False
    path = Path(api.hf_hub_download(repo, CONFIG, revision=revision))
    try:
        config = read_json(path)
    except CheckpointError:
        return False
    return isinstance(config, dict) and config.get("library") == "vitkit"


def _text(api: HfApi, repo: str, name: str, revision: str | None) -> str:
    return Path(api.hf_hub_download(repo, name, revision=revision)).read_text(encoding="utf-8", errors="replace")


def _snapshot(repo: str, revision: str | None, *, model_alone: bool) -> tuple[Path, list[str], list[str]]:
    """The Hub cache's copy of a repository; which files it has and which were left where they are."""
    with _explained(repo, revision):
        try:
            api = _api()
            info = api.model_info(repo, revision=revision, files_metadata=True)
        except Exception as error:
            if not _is_connection(error):
                raise
            return _cached(repo, revision, error)
        listing = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        names = [name for name in to_fetch(repo, listing) if not model_alone or name in (CONFIG, WEIGHTS)]
        folder = Path(api.snapshot_download(repo, revision=info.sha, allow_patterns=names))
        # Writes down which commit the name stands for, so that it is found without a network.
        api.hf_hub_download(repo, CONFIG, revision=revision)
    return folder, names, sorted(set(listing) - set(names) - {".gitattributes"})


def _cached(repo: str, revision: str | None, error: Exception) -> tuple[Path, list[str], list[str]]:
    try:
        found = Path(_api().hf_hub_download(repo, CONFIG, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise error from None
    folder = found.parent
    listing = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return folder, to_fetch(repo, listing), []


@contextmanager
def _explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises into a message that says the way out; tokens are left out of it."""
    try:
        yield
    except VitkitError:
        raise
    except Exception as error:
        told = _told(repo, revision, error)
        if told is None:
            raise
        raise HubError(_redacted(told)) from None


def _told(repo: str, revision: str | None, error: Exception) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        for kind, told in _CASES.items():
            if isinstance(cause, kind):
                return told.format(repo=repo, revision=revision)
        status = 403 if isinstance(cause, PermissionError) and _module(cause) == "hf_xet" else _status(cause)
        if status is not None:
            return _refused(repo, status, getattr(cause, "server_message", None) or "")
        if _is_connection(cause):
            what = f"{type(cause).__name__}: {cause}".rstrip(": ")[:200]
            return f"the connection to {_api().endpoint} for {repo} failed ({what}); check the network and {AGAIN}"
        cause = cause.__cause__ or cause.__context__
    return None


_CASES: dict[type[BaseException], str] = {
    LocalTokenNotFoundError: f"no access token for the Hub: make one that may write at {TOKENS}, then `hf auth login`, "
    f"or set HF_TOKEN",
    GatedRepoError: "{repo} is gated: ask for access on its page, and log in with `hf auth login`",
    RepositoryNotFoundError: "there is no repository {repo} on the Hub, or it is private and your token may not see it: "
    "check the name (or the directory, if you meant one), and log in with `hf auth login`",
    RevisionNotFoundError: "{repo} has no branch, tag or commit {revision!r}; see its page for those that it has",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE forbids reaching the Hub, and {repo} is not in the Hub cache: unset it, or load "
    "it once with a network",
}


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error is about, or None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _refused(repo: str, status: int, said: str) -> str:
    said = f" ({' '.join(said.split())[:300]})" if said else ""
    ways = {
        401: f"the Hub does not accept your access token: it is invalid or has expired{said}; make another at {TOKENS}, "
        f"then `hf auth login`, or set HF_TOKEN",
        403: f"your access token gives no right to {repo}{said}: log in as its owner, take a token that may write "
        f"({TOKENS}), push under your own name, or propose it with --create-pr",
        409: f"{repo} was changed by somebody else meanwhile{said}; {AGAIN}",
        413: f"{repo} is too large for the Hub{said}",
        429: f"the Hub asks to slow down{said}; wait a few minutes and {AGAIN}",
    }
    if status >= 500:
        return f"the Hub has trouble of its own: {status}{said}; wait a little and {AGAIN}"
    return ways.get(status, f"the Hub refused {repo}: {status}{said}")


def _is_connection(error: BaseException) -> bool:
    """Whether it is of the connection: no answer came, or none was allowed."""
    if isinstance(error, ConnectionError | TimeoutError):  # those of the Xet client are Python's own
        return True
    return _module(error) in CLIENTS and _status(error) is None


def _module(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _redacted(text: str) -> str:
    token = get_token()
    text = text.replace(token, "***") if token else text
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text)


__all__ = ["Plan", "Pushed", "fetch_run", "is_repo", "load", "plan", "pull", "push", "resolve"]
