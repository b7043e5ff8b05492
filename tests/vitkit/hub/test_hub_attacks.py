"""Repositories that mean harm: each is refused with a reason, nothing is run, nothing is left behind."""

import json
import os
import pickle
import threading
from pathlib import Path

import pytest

import vitkit
from vitkit.errors import CheckpointError, HubError, UsageError, VitkitError
from vitkit.hub import client
from vitkit.models.saving import check

# The client's own, of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def evil(hub_server, model_run, tmp_path):
    """`evil(**changed files)` puts a repository; pulling and loading it must fail, and leave nothing."""

    def attack(message: str, **changed: bytes) -> None:
        files = {name: (model_run / name).read_bytes() for name in client.plan(model_run, "you/evil").files}
        hub_server.put("you/evil", {**files, **{name.replace("__", "."): data for name, data in changed.items()}})
        before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
        with pytest.raises(HubError, match=message):
            client.pull("you/evil", tmp_path / "out" / "evil")
        assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} - before <= {tmp_path / "out"}

    return attack


def with_weights(model_run: Path, data: bytes) -> dict[str, bytes]:
    config = json.loads((model_run / "config.json").read_text())
    config["weights"]["bytes"] = len(data)
    return {"model__safetensors": data, "config__json": json.dumps(config).encode()}


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_a_pickle_under_a_safetensors_name(evil, model_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil("you/evil is refused: .*model.safetensors is no safetensors file", **with_weights(model_run, pickle.dumps(Bomb())))
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        vitkit.load("you/evil")
    assert not Path("bomb").exists()


def test_a_header_of_gigabytes(evil, model_run):
    data = (8 * 2**30).to_bytes(8, "little") + b'{"a":' + b" " * 1000
    evil("model.safetensors is no safetensors file", **with_weights(model_run, data))


def test_weights_that_are_a_link_elsewhere(evil, model_run):
    # Git keeps a link as a file that holds its target, and so does the Hub serve it.
    evil("model.safetensors is no safetensors file", **with_weights(model_run, b"../../../.ssh/id_ed25519"))


@pytest.mark.parametrize("depth", [40, 10_000, 200_000])
@pytest.mark.parametrize("name", ["config", "summary"])
def test_json_that_is_nested_too_deeply(evil, name, depth):
    text = '{"library": "vitkit", "format": 1, "arguments": ' + "[" * depth + "]" * depth + "}"
    evil(f"{name}.json is nested (more than 32 levels deep|too deeply to be read)", **{f"{name}__json": text.encode()})


def test_a_config_that_names_what_no_registry_has(hub_server, model_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {name: (model_run / name).read_bytes() for name in ("model.safetensors", "config.json")}
    config = json.loads(files["config.json"])
    for change, message in (
        ({"name": "os.system", "kwargs": {"command": "mkdir bomb"}}, "no head named 'os.system'"),
        ({"name": "os:system", "distribution": "os"}, "which is not installed: pip install"),
        ({"kind": "dataset", "name": "image_folder", "kwargs": {"folder": "/"}}, "is of kind 'dataset'"),
        ({"kind": "command", "name": "x"}, "is of kind 'command'"),
        ({"kwargs": {"in_dim": 8, "out_dim": {"__class__": "os.system"}}}, "out_dim is .*, expected int"),
    ):
        modules = {**config["modules"], "projector": {**config["modules"]["projector"], **change}}
        hub_server.put("you/evil", {**files, "config.json": json.dumps({**config, "modules": modules}).encode()})
        with pytest.raises(CheckpointError, match=message):
            vitkit.load("you/evil")
    assert not Path("bomb").exists()


@pytest.mark.parametrize("name", ["../evil.py", "plots/../../evil.png", "/etc/cron.d/evil", "..\\evil.py", "C:\\evil.py"])
def test_names_that_leave_the_directory(hub_server, model_run, tmp_path, name):
    client.push(model_run, "tiny")
    hub_server.put("you/evil", {**hub_server.files("me/tiny"), name: b"x"})
    for ask in (lambda: client.pull("you/evil", tmp_path / "out"), lambda: vitkit.load("you/evil")):
        with pytest.raises(HubError, match=r"you/evil names the file .* which lies outside of it; nothing was fetched"):
            ask()
    assert not (tmp_path / "out").exists()


def test_files_that_are_too_large_or_too_many_are_not_even_fetched(evil, hub_server):
    evil(r"you/evil: recipe.py has 1,048,577 bytes; 1,048,576 at most are fetched", recipe__py=b"#" * (2**20 + 1))
    evil(r"you/evil has 307 files; a run has at most 207", **{f"plots/p{number}__png": b"x" for number in range(299)})
    assert not any("/resolve/" in line for line in hub_server.requests)


def test_what_is_not_a_file_of_a_run_stays_where_it_is(hub_server, model_run, tmp_path):
    client.push(model_run, "tiny")
    others = ["modeling.py", "pytorch_model.bin", "plots/evil.svg", "plots/a/b.png", "report.html", ".gitignore"]
    hub_server.put("you/more", {**hub_server.files("me/tiny"), **dict.fromkeys(others, b"x")})
    where, left = client.pull("you/more", tmp_path / "out")
    assert left == sorted(others)
    assert not any((where / name).exists() for name in others)


def test_a_plot_that_is_no_png_image_is_refused(evil, hub_server):
    bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + (100_000).to_bytes(4) * 2 + bytes(9)
    for content, message in (
        (pickle.dumps(Bomb()), "plots/evil.png is no PNG image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run", "plots/evil.png is no PNG image"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "plots/evil.png (has|is no PNG image)"),
        (bomb, "plots/evil.png has 100000×100000 pixels; a plot has at most 64,000,000"),
    ):
        evil(f"you/evil is refused: {message}", **{"plots/evil__png": content})


def test_a_repository_cannot_be_named_by_a_missing_directory_where_its_prefix_is_asked_for(hub_server, model_run, tmp_path, monkeypatch):
    client.push(model_run, "tiny")
    monkeypatch.chdir(tmp_path)
    Path("me/tiny").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="me/tiny holds no config.json"):
        vitkit.load("me/tiny")  # a directory goes before a repository of its name
    assert vitkit.load("hf://me/tiny").classes == ["a", "b"]
    assert client.pull("hf://me/tiny", "copy")[0] == Path("copy")
    for name in ("hf://tiny", "hf://me/tiny/more", "hf://../tiny", "hf:///etc", "hf://me/tiny\x1b[2J"):
        with pytest.raises(UsageError, match="is no name of a Hub repository"):
            vitkit.load(name)


def test_two_pulls_into_one_directory_leave_one_complete_copy(hub_server, model_run, tmp_path):
    client.push(model_run, "tiny")
    hub_server.put("you/other", hub_server.files("me/tiny") | {"recipe.py": b"# another recipe"})
    outcomes: list[object] = []
    barrier = threading.Barrier(6)

    def pull(repo: str) -> None:
        barrier.wait()
        try:
            outcomes.append(client.pull(repo, tmp_path / "out"))
        except VitkitError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=pull, args=(repo,)) for repo in ("me/tiny", "you/other") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, tuple) for outcome in outcomes) == 1
    assert all("exists already" in str(outcome) for outcome in outcomes if not isinstance(outcome, tuple))
    copy = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    source = hub_server.files(json.loads(copy.pop("origin.json"))["repository"])
    assert copy == {name: content for name, content in source.items() if name != ".gitattributes"}
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def test_a_file_that_is_cut_while_it_is_copied_is_never_reported_as_done(hub_server, model_run, tmp_path, monkeypatch):
    client.push(model_run, "tiny")

    def cut(source: Path, target: Path) -> None:
        target.write_bytes(Path(source).read_bytes()[:-1])

    monkeypatch.setattr("shutil.copyfile", cut)
    with pytest.raises(HubError, match=r"me/tiny: \S+ has .* bytes, expected .*: it was cut short; pull it again"):
        client.pull("me/tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_repositories_without_a_model(hub_server, model_run, tmp_path):
    hub_server.put("you/none", {"README.md": b"# nothing"})
    with pytest.raises(HubError, match=r"you/none holds no config.json and no model.safetensors: it is not a model that"):
        client.pull("you/none", tmp_path / "out")
    hub_server.put("you/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    with pytest.raises(HubError, match=r"you/bert is refused: .* is no vitkit config"):
        client.pull("you/bert", tmp_path / "out")
    with pytest.raises(VitkitError, match=r"is no vitkit config"):
        vitkit.load("you/bert")


def test_a_pipe_in_place_of_a_file_does_not_hang(model_run):
    for name in ("model.safetensors", "config.json"):
        (model_run / name).unlink()
        os.mkfifo(model_run / name)
        with pytest.raises(CheckpointError, match=rf"{name} is no plain file"):
            check(model_run)
