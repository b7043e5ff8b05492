"""Runs as repositories of the Hugging Face Hub: push, pull, load. Nothing that comes from one is executed."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from vitkit.errors import CheckpointError, HubError, UsageError, nearest
from vitkit.hub.files import CARD, copy_into, files_to_fetch, max_bytes, require_free, run_files
from vitkit.hub.model_card import is_unedited, write_card
from vitkit.hub.problems import explained, is_connection
from vitkit.models import saving
from vitkit.models.model import Model
from vitkit.models.saving import CONFIG, WEIGHTS
from vitkit.models.untrusted import read_json
from vitkit.registry import version_of

PREFIX = "hf://"
"""The prefix of a source that names a repository, even if a directory of that name exists."""
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Plan:
    """The content of a push: the repository, the run's files with their sizes in bytes, and the model card."""

    repo: str
    run: Path
    files: dict[str, int]
    card: str


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the page of the commit or the pull request, and whether the card and the files stayed as they were."""

    repo: str
    url: str
    card_kept: bool
    unchanged: bool


def plan(run: str | Path, name: str, *, licence: str = "apache-2.0", allow_secrets: bool = False) -> Plan:
    """The content of a `push`, without the network; without an owner in `name` the card says OWNER.

    Raises the errors of `push` that concern the run.
    """
    run = Path(run)
    repo = _repo_id(name if "/" in name else f"OWNER/{name}")
    files = run_files(run, allow_secrets=allow_secrets)
    plots = [file for file in files if file.startswith("plots/")]
    return Plan(repo, run, files, write_card(run, repo, saving.check(run), plots, licence))


def push(
    run: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    licence: str = "apache-2.0",
    allow_secrets: bool = False,
) -> Pushed:
    """Publish a run as `[OWNER/]NAME` in one commit: model, recipe, metrics, plots and a card written from the run.

    `private` makes a new repository private, `revision` names a branch (created where it is missing), `create_pr` opens a pull
    request instead. A card that a person has edited stays. `allow_secrets` publishes files that seem to hold tokens or passwords.
    Raises `UsageError` for an invalid name and a directory without a run, `CheckpointError` for a damaged model, `HubError` for
    a file that seems to hold a secret and if the Hub or the network refuses.
    """
    planned = plan(run, name, licence=licence, allow_secrets=allow_secrets)  # checks the run before anything is sent
    with explained(name):
        api = _api()
        owner = api.whoami()["name"]
    repo = name if "/" in name else f"{owner}/{name}"
    if repo != planned.repo:
        planned = plan(run, repo, licence=licence, allow_secrets=allow_secrets)
    with explained(repo, revision):
        _prepare_repository(api, repo, private=private, revision=revision, create_pr=create_pr)
        info = api.model_info(repo, revision=revision)
        present = {sibling.rfilename for sibling in info.siblings or []}
        kept = CARD in present and not is_unedited(_text(api, repo, CARD, info.sha))
        files = [CommitOperationAdd(file, str(planned.run / file)) for file in planned.files]
        card = [] if kept else [CommitOperationAdd(CARD, planned.card.encode())]
        stale = [file for file in present - set(planned.files) - {CARD} if max_bytes(file) and "/" not in file]
        commit = api.create_commit(
            repo,
            [*files, *card, *(CommitOperationDelete(file) for file in sorted(stale))],
            commit_message=message or f"Run {planned.run.resolve().name} with vitkit {version_of('vitkit')}",
            revision=revision,
            create_pr=create_pr,
        )
    url = commit.pr_url if create_pr and commit.pr_url else f"{api.endpoint}/{repo}"
    if revision and not create_pr:
        url += f"/tree/{revision}"
    return Pushed(repo, url, kept, unchanged=commit.oid == info.sha)


def pull(repo: str, out: str | Path | None = None, *, revision: str | None = None) -> tuple[Path, list[str]]:
    """Copy the run of a repository `OWNER/NAME` into `out` (default: a directory of its name).

    Returns the directory and the names of files that were left out: only files of a run are taken, of bounded size, with a
    complete model, and plots that are PNG images. The directory is written completely or not at all. Raises `UsageError` if it
    exists already, `HubError` if the Hub refuses and for a repository that is no complete run.
    """
    repo = _repo_id(repo.removeprefix(PREFIX))
    out = Path(out or repo.rpartition("/")[2])
    require_free(out)
    folder, sizes, others = _snapshot(repo, revision, model_only=False)
    copy_into(repo, folder, sizes, out)
    return out, others


def resolve(source: str | Path, *, revision: str | None = None, model_only: bool = True) -> Path:
    """The directory of a saved model: `source` itself, or the Hub cache's copy of the repository that it names.

    `hf://OWNER/NAME` always names a repository; `OWNER/NAME` names one where no such directory exists. Without `model_only`
    the copy holds the records and the recipe of its run too. Without a network, or with `HF_HUB_OFFLINE=1`, it is the copy that
    was downloaded before. Raises `UsageError` for an invalid name, and `HubError`.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        return _snapshot(_repo_id(source.removeprefix(PREFIX)), revision, model_only=model_only)[0]
    if not is_repo(source):
        if revision is not None:
            raise UsageError(f"revision {revision!r} needs a Hub repository OWNER/NAME; {source} is a directory")
        return Path(source)
    try:
        return _snapshot(str(source), revision, model_only=model_only)[0]
    except HubError as error:
        siblings = [str(path) for path in Path(source).parent.glob("*") if path.is_dir()]
        hint = nearest(str(source), siblings)
        subject = f"{hint} It" if hint else ", so it"
        raise HubError(f"there is no directory {source}{subject} was searched on the Hub: {error}") from None


def fetch_run(repo: str, *, revision: str | None = None) -> Path:
    """The Hub cache's copy of a repository `OWNER/NAME`: its model, records and recipe. A local directory of that name is ignored.

    Raises `UsageError` for any other name, and `HubError`.
    """
    return resolve(f"{PREFIX}{repo}", revision=revision, model_only=False)


def load(source: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu") -> Model:
    """Build a saved model from a directory or a Hub repository, in evaluation mode.

    `source` is a directory, `hf://OWNER/NAME`, or `OWNER/NAME` where no such directory exists. Nothing from either is executed:
    only registered backbones, heads and losses are built, and tensors are read from safetensors. Raises `HubError`, and
    `CheckpointError` and `VersionWarning` as `vitkit.models.saving.load`.
    """
    return saving.load(resolve(source, revision=revision), device=device)


def is_repo(source: str | Path) -> bool:
    """Whether a model's source names a Hub repository: `hf://OWNER/NAME`, or `OWNER/NAME` where no such path exists."""
    if not isinstance(source, str):
        return False
    return source.startswith(PREFIX) or (REPO.fullmatch(source) is not None and not Path(source).exists())


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


def _prepare_repository(api: HfApi, repo: str, *, private: bool, revision: str | None, create_pr: bool) -> None:
    """Create the repository and the branch if they are missing.

    Raises `HubError` for a public repository with `private`, and for a repository that vitkit did not save.
    """
    try:
        info = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        if create_pr:
            raise
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo, files_metadata=True)
    if private and not info.private:
        raise HubError(
            f"{repo} exists and is public; --private is for a new repository: make it private in its settings "
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


def _snapshot(repo: str, revision: str | None, *, model_only: bool) -> tuple[Path, dict[str, int], list[str]]:
    """The Hub cache's copy of a repository, its files with their sizes, and the names of files that were left out."""
    with explained(repo, revision):
        try:
            api = _api()
            info = api.model_info(repo, revision=revision, files_metadata=True)
        except Exception as error:
            if not is_connection(error):
                raise
            return _cached(repo, revision, error)
        listing = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        names = [name for name in files_to_fetch(repo, listing) if not model_only or name in (CONFIG, WEIGHTS)]
        folder = Path(api.snapshot_download(repo, revision=info.sha, allow_patterns=names))
        # This call records the commit of the revision, for later calls without a network.
        api.hf_hub_download(repo, CONFIG, revision=revision)
    return folder, {name: listing[name] for name in names}, sorted(set(listing) - set(names) - {".gitattributes"})


def _cached(repo: str, revision: str | None, error: Exception) -> tuple[Path, dict[str, int], list[str]]:
    try:
        folder = Path(_api().hf_hub_download(repo, CONFIG, revision=revision, local_files_only=True)).parent
    except LocalEntryNotFoundError:
        raise error from None
    listing = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return folder, {name: listing[name] for name in files_to_fetch(repo, listing)}, []


__all__ = ["PREFIX", "Plan", "Pushed", "fetch_run", "is_repo", "load", "plan", "pull", "push", "resolve"]
