"""A small Hub on loopback for the real client: repositories in memory, LFS, revisions, pull requests, and faults.

The name of a dataset's repository begins with `datasets/`, as its page's does.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

Files = dict[str, bytes]
TOKEN = "hf_" + "Sec7retToken" * 3
REVISION = r"(?:/revision/(?P<revision>[^/]+))?"
REPO = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)"
API = rf"/api/(?:models/|(?=datasets/)){REPO}"


@dataclass
class Repo:
    """Branches and pull requests are names of commits; a commit is a dict of files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: Files, message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str | None) -> str | None:
        revision = unquote(revision or "main")
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """An answer in place of the right one, `times` times, for requests `METHOD /path` that match."""

    pattern: str
    status: int
    message: str = ""
    code: str = ""
    times: int = 1


class HubServer:
    """`url` is what `HF_ENDPOINT` points at; `requests` are `METHOD /path`, `uploads` the objects that arrived whole.

    `tokens` says who an access token belongs to and whether it may write; `cuts` is in how many of the next uploads
    the connection breaks half-way.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: dict[str, tuple[str, bool]] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.uploads: list[str] = []
        self.strangers: list[str | None] = []
        self.faults: list[Fault] = []
        self.cuts = 0
        self.closed = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Another host, as the Hub's own storage is: the client must not send its token there.
        self.storage = f"http://localhost:{self.http.server_port}/storage"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closed = True  # also for connections that the client keeps open
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def put(self, repo: str, files: Files, revision: str = "main", **settings: Any) -> str:
        """Files as somebody else could have committed them, whatever their names."""
        return self.repos.setdefault(repo, Repo(**settings)).commit(revision, files)

    def files(self, repo: str, revision: str = "main") -> Files:
        found = self.repos[repo]
        return found.commits[found.refs[revision]]


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that the client of this process talks to, where the token in HF_TOKEN belongs to `me`; its cache is `folder/cache`."""
    server = HubServer()
    server.tokens[TOKEN] = ("me", True)
    home = folder / "home"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)  # older clients know no Xet
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_any(self) -> None:
        if self.hub.closed:
            self.close_connection = True
            return self.connection.close()
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, f"{self.command} {path}"):
                fault.times -= 1
                self.body()
                return self.refuse(fault.status, fault.message, fault.code)
        if path.startswith("/storage/"):
            return self.store(path.rpartition("/")[2])
        self.raw = self.body()
        self.hub.bodies.append(self.raw)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.user, self.writes = self.hub.tokens.get(token, ("", False))
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return answer(self, **{key: value and unquote(value) for key, value in found.groupdict().items()})
        return self.refuse(404, f"no such page: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # -- what the Hub answers -----------------------------------------------------------------------------------

    def whoami(self) -> None:
        if not self.user:
            return self.refuse(401, "Invalid username or password.")
        return self.answer({"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.raw)
        repo = f"{asked['organization'] or self.user}/{asked['name']}"
        if repo in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
        if not self.may_write(repo):
            return self.refuse(403, f'You don\'t have the rights to create a model under the namespace "{repo}"')
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.put(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.answer({"url": f"{self.hub.url}/{repo}"})

    def validate(self) -> None:
        found = re.match(r"(?s)---\n(.*?)\n---\n", json.loads(self.raw)["content"])
        try:
            good = found is not None and isinstance(yaml.safe_load(found[1]), dict)
        except yaml.YAMLError:
            good = False
        return self.answer(
            {"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400
        )

    def info(self, repo: str, revision: str | None) -> None:
        found, sha = self.find(repo, revision)
        if found is None or sha is None:
            return
        siblings = [{"rfilename": name, "size": len(data)} for name, data in found.commits[sha].items()]
        self.answer({"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        found, sha = self.find(repo, revision)
        if found is None or sha is None:
            return
        start = f"{folder}/" if folder else ""
        below = {name: data for name, data in found.commits[sha].items() if name.startswith(start)}
        if folder and not below:
            return self.refuse(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        deep = "recursive=true" in urlsplit(self.path).query.lower()
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _oid(name, data)} for name, data in below.items()
        ] + [{"type": "directory", "path": name, "oid": _oid(name, b"")} for name in _folders(below) if name.startswith(start)]
        self.answer([entry for entry in entries if deep or "/" not in entry["path"].removeprefix(start)])

    def branch(self, repo: str, branch: str) -> None:
        found, _ = self.find(repo, None, writing=True)
        if found is None:
            return
        if branch in found.refs:
            return self.refuse(409, "Reference already exists")
        found.refs[branch] = found.refs["main"]
        self.answer({})

    def preupload(self, repo: str, revision: str) -> None:
        found, sha = self.find(repo, revision, writing=not self.asks_pr())
        if found is None or sha is None:
            return
        there = found.commits[sha]
        files = []
        for file in json.loads(self.raw)["files"]:
            name, sample = file["path"], base64.b64decode(file["sample"])
            oid = _oid(name, there[name]) if name in there else None
            mode = "lfs" if _is_lfs(name, sample) else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def batch(self, repo: str) -> None:
        wanted = json.loads(self.raw)["objects"]
        objects: list[dict[str, Any]] = []
        for item in wanted:
            known = item["oid"] in self.hub.objects
            actions = {"upload": {"href": f"{self.hub.storage}/{item['oid']}"}}
            objects.append(dict(item) if known else {**item, "actions": actions})
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, revision: str) -> None:
        found, sha = self.find(repo, revision, writing=not self.asks_pr())
        if found is None or sha is None:
            return
        files, message = dict(found.commits[sha]), ""
        for line in self.raw.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.refuse(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"])
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
        ref = f"refs/pr/{number}" if self.asks_pr() else revision
        made = found.commit(ref, files, message)
        page = f"{self.hub.url}/{repo}"
        self.answer({
            "success": True, "commitOid": made, "commitUrl": f"{page}/commit/{made}",
            "pullRequestUrl": f"{page}/discussions/{number}" if self.asks_pr() else None,
        })  # fmt: skip

    def file(self, repo: str, revision: str, name: str) -> None:
        found, sha = self.find(repo, revision)
        if found is None or sha is None:
            return
        data = found.commits[sha].get(name)
        if data is None:
            return self.refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(name, data)}"'}
        if _is_lfs(name, data):
            oid = hashlib.sha256(data).hexdigest()
            self.hub.objects[oid] = data
            headers |= {
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{self.hub.storage}/{oid}",
            }
            return self.send(302, b"", headers)
        return self.send(200, data, headers)

    # -- the storage behind it ----------------------------------------------------------------------------------

    def store(self, oid: str) -> None:
        self.hub.strangers.append(self.headers.get("Authorization"))
        if self.command == "PUT":
            if self.hub.cuts:
                self.hub.cuts -= 1
                self.rfile.read(min(int(self.headers.get("Content-Length") or 8), 4000) // 2)
                self.close_connection = True
                return self.connection.close()
            data = self.body()
            assert hashlib.sha256(data).hexdigest() == oid
            self.hub.objects[oid] = data
            self.hub.uploads.append(oid)
            return self.send(200, b"", {"ETag": oid})
        return self.send(200, self.hub.objects[oid], {})

    # -- how it is said -----------------------------------------------------------------------------------------

    def may_write(self, repo: str) -> bool:
        return self.writes and _owner(repo) == self.user

    def asks_pr(self) -> bool:
        return "create_pr=1" in urlsplit(self.path).query

    def find(self, repo: str, revision: str | None, *, writing: bool = False) -> tuple[Repo | None, str | None]:
        """The repository and the commit, or the refusal that the Hub sends."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and _owner(repo) != self.user):
            self.refuse(404 if self.user else 401, "Repository not found", "RepoNotFound")
        elif found.gated and _owner(repo) != self.user:
            self.refuse(403, f"Access to model {repo} is restricted", "GatedRepo")
        elif writing and not self.may_write(repo):
            self.refuse(403, "You have no right to write to this repository")
        elif (sha := found.sha(revision)) is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        else:
            return found, sha
        return None, None

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **said})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"{API}{REVISION}", _Handler.info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.file),
]


def _is_lfs(name: str, sample: bytes) -> bool:
    """As the Hub's `.gitattributes` and its look at the first bytes say."""
    return name.endswith((".safetensors", ".png")) or b"\0" in sample


def _folders(files: Files) -> set[str]:
    return {str(folder) for name in files for folder in PurePosixPath(name).parents[:-1]}


def _owner(repo: str) -> str:
    return repo.removeprefix("datasets/").split("/")[0]


def _oid(name: str, data: bytes) -> str:
    """What the client compares with its own file: the SHA-256 of an LFS object, Git's hash of any other."""
    if _is_lfs(name, data):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


__all__ = ["TOKEN", "Fault", "HubServer", "Repo", "serving"]
