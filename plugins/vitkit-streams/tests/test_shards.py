"""Tar shards: what urls mean, what an index holds, downloads, and mistakes with the way out."""

import functools
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from vitkit import datasets
from vitkit.errors import DatasetError, UsageError
from vitkit_streams.shards import Cache, Fields, expanded
from vitkit_streams.splits import class_names
from vitkit_streams.writing import write_shards

FIELDS = Fields("jpg;jpeg;png;webp", "cls")


def png(value: int = 0, side: int = 8) -> bytes:
    body = io.BytesIO()
    Image.fromarray(np.full((side, side), value, dtype=np.uint8)).save(body, "PNG")
    return body.getvalue()


def tar(path, files):
    with tarfile.open(path, "w") as writer:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            writer.addfile(info, io.BytesIO(body))
    return str(path)


def read_by_webdataset(path):
    """Its samples; `WebDataset` itself leaves its files open."""
    with open(path, "rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": path, "stream": stream}])))


@pytest.fixture
def shards(tmp_path):
    """60 pictures whose grey value is their number, in shards of 8."""
    pictures = [np.full((8, 8), number, dtype=np.uint8) for number in range(60)]
    write_shards(tmp_path / "shards", pictures, [number % 3 for number in range(60)], per_shard=8)
    return tmp_path / "shards"


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 1.0)


def build(tmp_path, **options):
    common = {"img_size": 8, "channels": 1, "cache": str(tmp_path / "cache"), "workers": 2, "val_size": 0}
    return datasets.build("webdataset", **common | options)


@pytest.mark.vitkit("vitkit-streams")
def test_contract(vitkit_check):
    vitkit_check()


def test_urls_follow_webdatasets_conventions(shards):
    names = [str(shards / f"train-{number:06d}.tar") for number in range(8)]
    assert expanded(f"{shards}/train-{{000000..000007}}.tar") == names
    assert expanded(str(shards)) == expanded(f"{shards}/train-*.tar") == names
    assert expanded(f"{names[0]}::file://{names[3]}") == [names[0], names[3]]
    assert expanded("https://host/a-{0..1}.tar") == ["https://host/a-0.tar", "https://host/a-1.tar"]
    assert expanded("pipe:cat a-{0..1}.tar", allow_pipe=True) == ["pipe:cat a-0.tar", "pipe:cat a-1.tar"]


@pytest.mark.parametrize(
    ("urls", "error", "text"),
    [
        ("/nowhere/a.tar", DatasetError, "no shard at /nowhere/a.tar; braces write several"),
        ("/nowhere/*.tar", DatasetError, "no shard fits '/nowhere/\\*.tar'"),
        ("gopher://a/b.tar", UsageError, "has the scheme 'gopher'; known are local files and http, https, hf"),
        ("pipe:touch hacked", UsageError, "'pipe:touch hacked' would run a command in a shell, .* give allow_pipe=true"),
        ("a.tar::pipe:touch hacked", (UsageError, DatasetError), "no shard at .*a.tar"),
        (["https://a/b.tar", "pipe:touch hacked"], UsageError, "would run a command"),
        (["https://a/b.tar", "https://a/b.tar"], UsageError, "a shard is named twice: https://a/b.tar"),
        ([], UsageError, "it names no shard"),
    ],
)
def test_urls_that_are_refused(urls, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        expanded(urls)
    assert not (tmp_path / "hacked").exists()


def test_an_index_finds_the_samples_that_webdataset_reads(shards, cache):
    for url in expanded(str(shards)):
        shard = cache.shard(url, FIELDS)
        read = read_by_webdataset(url)
        assert [cache.read(shard, place) for place in range(len(shard.sizes))] == [sample["png"] for sample in read]
        assert [shard.texts[code] for code in shard.codes] == [sample["cls"].decode() for sample in read]
        assert [shard.key(place) for place in range(len(read))] == [sample["__key__"] for sample in read]


def test_names_with_folders_dots_and_capitals_are_read_as_webdataset_reads_them(tmp_path, cache):
    path = tar(tmp_path / "a.tar", [
        ("__meta__", b"{}"), ("one/a.seg.png", png(1)), ("one/a.PNG", png(2)), ("one/a.json", b'{"kind": "owl"}'),
        ("two.b/a.jpeg", png(3)), ("two.b/a.json", b'{"kind": "lynx", "x": 1}'), ("only.txt", b"text"),
    ])  # fmt: skip
    shard = cache.shard(path, Fields("png;jpeg", "json:kind"))
    assert shard.texts == ["owl", "lynx"]
    assert [cache.read(shard, place) for place in range(2)] == [png(2), png(3)]
    assert [shard.key(place) for place in range(2)] == ["one/a", "two.b/a"]
    assert shard.skipped == [f"{path}: only: no png;jpeg among its files: txt"]


@pytest.mark.parametrize(
    ("files", "label", "text"),
    [
        ([("a.png", png())], "cls", r"sample 'a' of the shard .*a.tar has no label: no 'cls' among its files: png; say where"),
        ([("a.png", png()), ("a.cls", b" ")], "cls", "has an empty label, 'a.cls'"),
        ([("a.png", png()), ("a.cls", b"\xff")], "cls", "is no text in UTF-8"),
        ([("a.png", png()), ("a.json", b'{"b": 1}')], "json:a", "'a.json' is no JSON object with an entry 'a'"),
        ([("a.cls", b"1")], "cls", "holds no sample with a picture .*a: no jpg;jpeg;png;webp among its files: cls"),
        ([], "cls", "holds no sample with a picture"),
    ],
)
def test_shards_that_cannot_be_used_say_why(files, label, text, tmp_path, cache):
    path = tar(tmp_path / "a.tar", files)
    with pytest.raises(DatasetError, match=text):
        cache.shard(path, Fields(FIELDS.image, label))


def test_damaged_shards_are_named(tmp_path, cache):
    tar(tmp_path / "whole.tar", [(f"{n}.png", png()) for n in range(9)])
    whole = (tmp_path / "whole.tar").read_bytes()
    for name, body in (("text.tar", b"no tar at all" * 100), ("empty.tar", b""), ("cut.tar", whole[:1000])):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(DatasetError, match=f"the shard .*{name} is no tar file or cut short"):
            cache.shard(str(tmp_path / name), FIELDS)


def test_a_shard_that_changes_or_goes_while_it_is_read_is_named(tmp_path, cache):
    path = tar(tmp_path / "a.tar", [("a.png", png()), ("a.cls", b"0")])
    shard = cache.shard(path, FIELDS)
    with open(path, "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(DatasetError, match="the shard .*a.tar has changed since it was indexed"):
        cache.read(shard, 0)
    assert cache.shard(path, FIELDS).bytes == shard.bytes + 512  # indexed anew
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DatasetError, match="the shard .*a.tar is gone"):
        cache.read(shard, 0)


def test_classes_are_numbers_names_or_given(tmp_path):
    assert class_names(["2", "0"], None) == ["0", "1", "2"]
    assert class_names(["owl", "lynx"], None) == ["lynx", "owl"]
    (tmp_path / "names.txt").write_text("owl\nlynx\n")
    assert class_names(["1"], str(tmp_path / "names.txt")) == ["owl", "lynx"]
    with pytest.raises(DatasetError, match="no file of class names at"):
        class_names(["1"], str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="at least two different names"):
        class_names(["1"], ["owl", "owl"])
    with pytest.raises(DatasetError, match="give classes"):
        class_names(["90000000"], None)


def test_labels_that_are_no_class_are_named(tmp_path, shards):
    with pytest.raises(DatasetError, match=r"train-000000.tar: 00000002 has the label '2', which is none of the 2 classes"):
        build(tmp_path, urls=str(shards), classes=["owl", "lynx"])
    data = build(tmp_path, urls=str(shards), classes=["owl", "lynx", "newt"])
    assert data.classes == ["owl", "lynx", "newt"]


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"img_size": 0}, "img_size is 0"), ({"channels": 2}, "channels is 2; expected 3, RGB, or 1, grey"),
        ({"workers": 0}, "workers is 0"), ({"test_size": 0}, "test_size is 0"), ({"open_shards": 0}, "open_shards is 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1"),
    ],
)  # fmt: skip
def test_options_out_of_range(option, text, tmp_path, shards):
    with pytest.raises(UsageError, match=text):
        build(tmp_path, urls=str(shards), **option)


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def host(shards):
    """A host of the shards, and which paths it was asked for."""
    Handler.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.asked
    server.shutdown()
    thread.join()
    server.server_close()


def epoch(data, number=0, **options):
    found = list(data.train.batches(8, shuffle=True).epoch(number, seed=5, **options))
    return torch.cat([batch["images"] for batch in found]), torch.cat([batch["labels"] for batch in found])


def test_shards_from_a_host_give_the_batches_of_local_ones(host, shards, tmp_path):
    url, asked = host
    local = build(tmp_path, urls=f"{shards}/train-{{000000..000007}}.tar")
    remote = build(tmp_path, urls=f"{url}/train-{{000000..000007}}.tar", cache=str(tmp_path / "remote"))
    for found, expected in zip(epoch(remote), epoch(local), strict=True):
        assert torch.equal(found, expected)
    assert len(asked) == 8  # each once
    # With less room than a shard takes they are fetched again, and the batches stay the same; the one used last stays.
    tight = build(tmp_path, urls=f"{url}/train-{{000000..000007}}.tar", cache=str(tmp_path / "tight"), cache_gb=25e-6)
    for found, expected in zip(epoch(tight), epoch(local), strict=True):
        assert torch.equal(found, expected)
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    assert 25_000 < largest <= 60_000
    assert sum(path.stat().st_size for path in (tmp_path / "tight").glob("*.tar")) <= largest
    assert len(asked) > 16


def test_a_shard_that_a_host_does_not_have_is_named(host, tmp_path):
    url, _ = host
    with pytest.raises(DatasetError, match=rf"the shard {url}/none.tar cannot be had: FileNotFoundError.*check its url"):
        build(tmp_path, urls=f"{url}/none.tar")
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_command_that_is_allowed_and_one_that_fails(shards, tmp_path):
    data = build(tmp_path, urls=f"pipe:cat {shards}/train-{{000000..000003}}.tar", allow_pipe=True)
    assert len(data.train) + len(data.test) == 32
    with pytest.raises(DatasetError, match="the shard pipe:cat /nowhere.tar 2>/dev/null cannot be had"):
        build(tmp_path, urls="pipe:cat /nowhere.tar 2>/dev/null", allow_pipe=True)


def test_an_index_is_made_once_and_a_damaged_one_is_named(shards, cache, monkeypatch):
    url = str(shards / "train-000000.tar")
    shard = cache.shard(url, FIELDS)
    with monkeypatch.context() as patch:
        patch.setattr("vitkit_streams.shards.scan", lambda *_: pytest.fail("read through a second time"))
        assert torch.equal(cache.shard(url, FIELDS).offsets, shard.offsets)
    shard.index.write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="the index .* is damaged"):
        cache.shard(url, FIELDS)


def test_written_shards_hold_what_was_given(shards):
    samples = [sample for path in expanded(str(shards)) for sample in read_by_webdataset(path)]
    pictures = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in samples]
    assert [(int(picture.flat[0]), int(sample["cls"])) for picture, sample in zip(pictures, samples, strict=True)] == [
        (number, number % 3) for number in range(60)
    ]
