"""`hf_dataset` from a repository of the Hub, by the real client: revisions, private ones, no network."""

import io
import socket
import time

import datasets as hf
import numpy as np
import pytest
from hub_server import TOKEN, serving
from PIL import Image

from vitkit import datasets
from vitkit.errors import DatasetError

# The client's own, of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def parquet(values):
    """A file of pictures with these grey values, whose classes are the values modulo four."""
    rows = {"image": [], "label": [value % 4 for value in values]}
    for value in values:
        body = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(body, "PNG")
        rows["image"].append({"bytes": body.getvalue(), "path": None})
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["n", "e", "s", "w"])})
    body = io.BytesIO()
    hf.Dataset.from_dict(rows, features=features).to_parquet(body)
    return body.getvalue()


def repository(first=0):
    return {
        "README.md": b"---\nlicense: mit\n---\n# Grey pictures\n",
        "data/train-00000-of-00002.parquet": parquet(range(first, first + 20)),
        "data/train-00001-of-00002.parquet": parquet(range(first + 20, first + 40)),
        "data/test-00000-of-00001.parquet": parquet(range(200, 208)),
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with the repository me/grey, which `datasets` asks too, and nobody else."""
    hf.disable_progress_bars()
    with serving(tmp_path, monkeypatch) as server:
        monkeypatch.setattr(hf.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "tables")
        monkeypatch.setattr(hf.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        monkeypatch.setattr(hf.config, "USE_PARQUET_EXPORT", False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's attempts
        server.put("datasets/me/grey", repository())
        yield server


def build(path="me/grey", **options):
    return datasets.build("hf_dataset", **{"path": path, "img_size": 8, "channels": 1, "workers": 2, "val_size": 0, **options})


def values(data):
    """The grey values of the training pictures."""
    return data.train.in_memory().images[:, 0, 0, 0].tolist()


def test_a_repository_of_parquet_files(hub):
    data = build()
    assert data.classes == ["n", "e", "s", "w"]
    assert values(data) == list(range(40))
    assert data.train.labels.tolist() == [value % 4 for value in range(40)]
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(200, 208))
    commit = hub.repos["datasets/me/grey"].refs["main"]
    assert (data.name, data.hub_id, data.notice) == ("grey", "me/grey", "")
    assert data.source == f"Hugging Face datasets: me/grey, commit {commit}"
    assert hub.strangers
    assert set(hub.strangers) == {None}  # the storage was shown no token
    fetched = len(hub.strangers)
    assert values(build()) == list(range(40))
    assert len(hub.strangers) == fetched  # the second time all is there


def test_revisions(hub):
    other = hub.put("datasets/me/grey", repository(100), revision="v1")
    assert values(build()) == list(range(40))
    for revision in ("v1", other):
        data = build(revision=revision)
        assert values(data) == list(range(100, 140))
        assert data.source.endswith(f", commit {other}")


LOGIN = "check its name and revision; a private or gated one needs `hf auth login`, or the HF_TOKEN of an account that may read it"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"path": "me/gray"}, f"'me/gray' is not available: .* doesn't exist on the Hub or cannot be accessed; {LOGIN}"),
        ({"path": "you/private"}, f"'you/private' is not available: .* or cannot be accessed; {LOGIN}"),
        ({"path": "you/gated"}, f"'you/gated' is a gated dataset on the Hub.*to ask for access; {LOGIN}"),
        ({"revision": "v9"}, f"Revision 'v9' doesn't exist for dataset 'me/grey' on the Hub; {LOGIN}"),
        ({"config": "big"}, "'big' not found. Available: \\['default'\\]; check its name, config and revision"),
        ({"path": "me/words"}, "the dataset 'me/words' is not available: .*; check its name, config and revision"),
        ({"path": "me/broken"}, "the dataset 'me/broken' is not available: .*; check its name, config and revision"),
    ],
)
def test_what_the_hub_refuses(hub, options, text):
    hub.put("datasets/you/private", repository(), private=True)
    hub.put("datasets/you/gated", repository(), gated=True)
    hub.put("datasets/me/words", {"README.md": b"# Nothing yet\n"})
    hub.put("datasets/me/broken", {"data/train.parquet": b"\0no parquet"})
    with pytest.raises(DatasetError, match=text) as caught:
        build(**options)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_private_repository_wants_its_owners_token(hub, monkeypatch):
    hub.repos["datasets/me/grey"].private = True
    hub.tokens["hf_another"] = ("you", True)
    for token in ("", "hf_another", "hf_expired"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(DatasetError, match=f"the dataset 'me/grey' is not available: .*; {LOGIN}"):
            build()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert values(build()) == list(range(40))


def test_without_a_network_the_copy_is_taken_but_none_of_another_revision(hub):
    first = hub.repos["datasets/me/grey"].refs["main"]
    build()
    hub.close()
    for revision in (None, first):
        data = build(revision=revision)
        assert values(data) == list(range(40))
        assert data.source.endswith(f", commit {first}")
    with pytest.raises(DatasetError, match=f"is of commit {first}, not known to be 'v1'; check the network, or give revision={first}"):
        build(revision="v1")
    with pytest.raises(DatasetError, match="'me/other' is not available: ConnectionError: .*; check the network, and HF_ENDPOINT"):
        build("me/other")


def test_offline_mode_asks_nobody(hub, monkeypatch):
    first = hub.repos["datasets/me/grey"].refs["main"]
    build()
    hub.requests.clear()
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)
    copy = f"me/grey is not available from the Hub, and the copy on this machine is of commit {first}"
    for revision, notice in ((None, f"{copy}; this copy is used, and may not be the newest"), (first, "")):
        data = build(revision=revision)
        assert values(data) == list(range(40))
        assert data.notice == notice
    with pytest.raises(DatasetError, match=f"{copy}, not known to be 'v1'"):
        build(revision="v1")
    with pytest.raises(DatasetError, match="'me/other' is not available: ConnectionError: .*OfflineModeIsEnabled.*; check the network"):
        build("me/other")
    assert hub.requests == []


def test_other_hosts_are_asked_by_default_and_need_not_answer(hub, monkeypatch):
    asked, resolve = set(), socket.getaddrinfo

    def answering(host, *arguments, **keywords):
        if host not in ("127.0.0.1", "localhost"):
            asked.add(host)
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        return resolve(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", answering)
    for name in ("HF_UPDATE_DOWNLOAD_COUNTS", "USE_PARQUET_EXPORT"):
        monkeypatch.setattr(hf.config, name, True)
    assert values(build()) == list(range(40))
    assert asked == {"datasets-server.127.0.0.1", "s3.amazonaws.com"}
    asked.clear()
    monkeypatch.setattr(hf.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    assert values(build(revision=hub.repos["datasets/me/grey"].refs["main"])) == list(range(40))
    assert asked == set()
