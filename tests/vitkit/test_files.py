"""Atomic file writes, and output files that exist already."""

import errno
import json
import os
import stat
import threading

import pytest

from vitkit.errors import RunError, UsageError
from vitkit.files import atomic_write, check_output, write_json, write_text


def test_a_file_takes_its_place_in_one_step_and_only_when_all_went_well(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half of tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "No space left on device; free some room, or choose another --out"),
        (errno.EACCES, "Permission denied; choose a directory that you may write to"),
        (errno.EROFS, "Read-only file system; choose a directory that can be written to"),
        (errno.EIO, "Input/output error; no incomplete file was left"),
    ],
)
def test_what_goes_wrong_is_said_with_a_way_out(tmp_path, monkeypatch, number, text):
    path = tmp_path / "file.txt"
    write_text(path, "before")

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as caught:
        write_text(path, "after")
    assert str(caught.value) == f"cannot write {path}: {text}"
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file.below: (Not a directory|File exists)"):
        write_text(tmp_path / "file" / "below", "x")


def test_json_is_readable_everywhere(tmp_path):
    value = {"name": "café 猫", "bad": [float("nan"), float("inf"), 1.5], "pair": (1, None), 3: True}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "café 猫", "bad": [None, None, 1.5], "pair": [1, None], "3": True}
    assert "猫" in text
    assert text.endswith("}\n")


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "file.txt"
    texts = {letter * 100_000 for letter in "ab"}
    write_text(path, "a" * 100_000)
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for text in texts:
            write_text(path, text)
    done.set()
    reader.join()
    assert seen <= texts


def test_what_is_flushed_may_be_written_to(tmp_path, monkeypatch):
    """Windows refuses to flush a file that was opened for reading."""
    fcntl = pytest.importorskip("fcntl")
    modes, sync = [], os.fsync

    def noting(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        sync(descriptor)

    monkeypatch.setattr("vitkit.files.os.fsync", noting)
    write_text(tmp_path / "file.txt", "x")
    assert modes == [os.O_RDWR]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "secret.json"
    path.write_text("before")
    path.chmod(mode)
    seen = []
    with atomic_write(path) as temporary:
        temporary.write_text("after")
        seen.append(stat.S_IMODE(temporary.stat().st_mode))
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert seen == [0o600]
    assert path.read_text() == "after"


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "umask", lambda mask: pytest.fail("other threads would create files that everyone may write")
    )
    write_text(tmp_path / "new", "x")
    write_text(tmp_path / "new", "y")


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    write_text(tmp_path / ("x" * 255), "x")
    assert (tmp_path / ("x" * 255)).read_text() == "x"


def test_a_file_name_that_is_not_utf_8_survives_json(tmp_path):
    write_json(tmp_path / "names.json", {"file": "caf\udce9.png"})
    assert json.loads((tmp_path / "names.json").read_text()) == {"file": "caf\udce9.png"}


def test_an_output_file_is_replaced_only_on_request_and_only_if_it_is_ours(tmp_path):
    path = tmp_path / "out.json"
    ours = {"is_ours": lambda path: path.read_text() == "scores", "kind": "a file of scores"}
    check_output(path, overwrite=False, **ours)
    path.write_text("scores")
    with pytest.raises(UsageError, match=r"-o .*out.json exists already; choose another name, or give --overwrite"):
        check_output(path, overwrite=False, **ours)
    check_output(path, overwrite=True, **ours)
    path.write_text("a letter")
    with pytest.raises(UsageError, match=r"-o .*out.json exists and is not a file of scores, so it is not replaced"):
        check_output(path, overwrite=True, **ours)
    with pytest.raises(UsageError, match="is a directory; expected the name of a file of scores"):
        check_output(tmp_path, overwrite=True, **ours)
    path.write_text("scores")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UsageError, match="so it is not replaced"):
        check_output(tmp_path / "link", overwrite=True, **ours)
