"""Tar shards: what urls mean, what an index holds, downloads, and mistakes with the way out."""

import functools
import http.server
import io
import sys
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
        ([("a.png", png())], "cls", r"sample 'a' of the shard .*a.tar has no label: no 'cls' among its files: png; give its place"),
        ([("a.png", png()), ("a.cls", b" ")], "cls", "has an empty label, 'a.cls'"),
        ([("a.png", png()), ("a.cls", b"\xff")], "cls", "is no text in UTF-8"),
        ([("a.png", png()), ("a.json", b'{"b": 1}')], "json:a", "'a.json' is no JSON object with an entry 'a'"),
        ([("a.cls", b"1")], "cls", "holds no sample with an image .*a: no jpg;jpeg;png;webp among its files: cls"),
        ([], "cls", "holds no sample with an image"),
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
    with pytest.raises(DatasetError, match="the shard .*a.tar was removed since training began; put it back and resume"):
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
    with pytest.raises(DatasetError, match=r"train-000000.tar: 00000002 has the label '2', which is not one of the 2 classes"):
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
    with pytest.raises(DatasetError, match=rf"the shard {url}/none.tar is not available: FileNotFoundError.*check its url"):
        build(tmp_path, urls=f"{url}/none.tar")
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_command_that_is_allowed_and_one_that_fails(shards, tmp_path):
    data = build(tmp_path, urls=f"pipe:cat {shards}/train-{{000000..000003}}.tar", allow_pipe=True)
    assert len(data.train) + len(data.test) == 32
    with pytest.raises(DatasetError, match="the shard pipe:cat /nowhere.tar 2>/dev/null is not available"):
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


def header(name=b"a.png", size=b"00000000010\0", kind=b"0"):
    """512 bytes of a tar header with these raw fields and a right checksum."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124:136], block[156:157] = name, b"0000644\0", size, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(size):
    """A size in base 256, as GNU tar writes large ones; negative ones are nobody's."""
    return (size + (1 << 95) if size >= 0 else size % (1 << 96)).to_bytes(12, "big")


def pax(text):
    return header(b"pax", b"%011o\0" % len(text), b"x") + text.ljust(-(-len(text) // 512) * 512, b"\0")


def sample(key, value):
    body = png(value)
    files = ((f"{key}.png", body), (f"{key}.cls", b"1"))
    return b"".join(header(name.encode(), b"%011o\0" % len(data)) + data.ljust(-(-len(data) // 512) * 512, b"\0") for name, data in files)


def peak_kilobytes():
    """The largest memory that this process had; 0 where it is not known."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


ATTACKS = {
    "negative": header(b"evil.png", binary(-512)),
    "negative_far": header(b"evil.png", binary(-(1 << 40))),
    "negative_pax": pax(b"13 size=-512\n") + header(b"evil.png"),
    "huge": header(b"evil.png", binary(1 << 60)),
    "no_number": header(b"evil.png", b"12x45678901\0"),
    "long_name_of_gigabytes": header(b"evil", binary(1 << 33), b"L"),
    "chain_of_extensions": pax(b"9 a=bcde\n") * 3000 + header(b"evil.png", binary(-1)),
    "checksum": header(b"evil.png")[:148] + b"0000000\0" + header(b"evil.png")[156:],
    "sparse": header(b"evil.png", b"%011o\0" % 0, b"S"),
    "sparse_pax": pax(b"22 GNU.sparse.major=1\n") + header(b"evil.png", b"%011o\0" % 0),
    "garbage": b"ustar" * 1000 + b"\0" * (-5000 % 512),
    "ends_with_garbage": b"\xff" * 1024,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_member_is_named_and_left_out_and_the_scan_ends(attack, tmp_path, cache):
    path = tmp_path / "a.tar"
    path.write_bytes(sample("one", 1) + ATTACKS[attack] + sample("two", 2) + b"\0" * 1024)
    before = peak_kilobytes()
    shard = cache.shard(str(path), FIELDS)
    assert [shard.key(place) for place in range(2)] == ["one", "two"]
    assert [cache.read(shard, place) for place in range(2)] == [png(1), png(2)]
    assert len(shard.offsets) == 2
    assert len(shard.skipped) == 1
    assert "evil" in shard.skipped[0] or "no tar header" in shard.skipped[0]
    assert peak_kilobytes() - before < 100_000


def test_names_of_any_bytes_are_named_escaped(tmp_path, cache):
    path = tmp_path / "a.tar"
    latin = sample("one", 1).replace(b"one", b"\xe9\x1b[")
    # The checksum is that of the new name.
    blocks = [latin[at : at + 512] for at in range(0, len(latin), 512)]
    fixed = [header(block[:7].rstrip(b"\0"), block[124:136]) if block[257:262] == b"ustar" else block for block in blocks]
    path.write_bytes(b"".join(fixed) + sample("two", 2))
    shard = cache.shard(str(path), FIELDS)
    assert [shard.key(place) for place in range(2)] == ["\\udce9\\x1b[", "two"]


def test_a_shard_of_many_bad_members_keeps_few_lines(tmp_path, cache):
    path = tmp_path / "a.tar"
    path.write_bytes(ATTACKS["negative"] * 5000 + sample("two", 2))
    shard = cache.shard(str(path), FIELDS)
    assert len(shard.skipped) == 101
    assert shard.skipped[0] == f"{path}: evil.png: its size is negative or no number"


def test_an_image_file_of_too_many_bytes_is_left_out_unread(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("vitkit_streams.shards.MAX_FILE_BYTES", 200)
    body = png(3, 64) * 3
    path = tar(tmp_path / "a.tar", [("big.png", body), ("big.cls", b"0"), ("small.png", png(1)), ("small.cls", b"0")])
    shard = cache.shard(path, FIELDS)
    assert (len(shard.offsets), shard.key(0)) == (1, "small")
    assert shard.skipped == [f"{path}: big: its image has {len(body):,} bytes; expected at most 200"]


def test_a_postscript_file_that_is_called_png_is_not_opened(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript was started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    files = [(f"{n}.{end}", body) for n in range(10) for end, body in (("png", png(n)), ("cls", b"%d" % (n % 2)))]
    path = tar(tmp_path / "a.tar", [("eps.png", script), ("eps.cls", b"0"), *files])
    data = build(tmp_path, urls=path, test_urls=path, test_size=4)
    assert sorted(label for batch in data.train.batches(4).epoch(0) for label in batch["labels"].tolist()) == [0] * 5 + [1] * 5
    (line,) = data.train.skipped
    assert line.startswith(f"{path}: eps: UnidentifiedImageError: cannot identify image file; expected JPEG, PNG")
