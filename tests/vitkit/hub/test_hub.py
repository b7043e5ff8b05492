"""Push, pull and load with the real client against a small Hub on loopback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Fault
from huggingface_hub import ModelCard, constants
from rich.console import Console

import vitkit
from vitkit.errors import HubError, UsageError
from vitkit.hub import client
from vitkit.reproduce import reproduce

# The client's own, of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PUBLISHED = [
    "README.md", "config.json", "losses.csv", "metrics.csv", "model.safetensors", "plots/losses.png",
    "plots/m1_confusion.png", "recipe.py", "summary.json",
]  # fmt: skip


def files_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_goes_up_in_one_commit_and_comes_back_as_it_was(hub_server, model_run, tmp_path):
    done = client.push(model_run, "tiny", message="first")
    assert (done.repo, done.url, done.card_kept, done.unchanged) == ("me/tiny", f"{hub_server.url}/me/tiny", False, False)
    assert sorted(hub_server.files("me/tiny")) == [".gitattributes", *PUBLISHED]
    assert hub_server.repos["me/tiny"].messages == ["", "first"]
    where, left = client.pull("me/tiny", tmp_path / "back")
    assert left == []
    mine = files_under(model_run)
    back = files_under(where)
    assert json.loads(back.pop("origin.json")) == {"repository": "me/tiny"}
    assert sorted(back) == PUBLISHED
    assert all(mine[name] == data for name, data in back.items() if name != "README.md")


def test_a_model_is_loaded_by_its_name(hub_server, model_run, monkeypatch, tmp_path):
    client.push(model_run, "me/tiny")
    monkeypatch.chdir(tmp_path)
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    here, there = vitkit.load(model_run), vitkit.load("me/tiny")
    torch.testing.assert_close(
        there.encode_image(there.preprocess(images)), here.encode_image(here.preprocess(images)), rtol=0, atol=0
    )
    fetched = (tmp_path / "cache").glob("models--me--tiny/snapshots/*/*")
    assert sorted(path.name for path in fetched) == ["config.json", "model.safetensors"]


def test_the_readme_loads_what_it_pushes(hub_server, model_run, monkeypatch, tmp_path):
    readme = (Path(__file__).parents[3] / "vitkit/hub/README.md").read_text(encoding="utf-8")
    code = re.search(r"(?s)<!-- hub: load -->\n```python\n(.*?)```", readme)[1]
    client.push(model_run, "me/jepa-mnist")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["model"], vitkit.Model)


def test_a_directory_goes_before_a_repository_of_its_name(model_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path.parent)
    source = f"{tmp_path.name}/{model_run.name}"
    assert not client.is_repo(source)
    assert vitkit.load(source).classes == ["a", "b"]
    with pytest.raises(UsageError, match="revision 'v1' needs a Hub repository OWNER/NAME; .* is a directory"):
        vitkit.load(model_run, revision="v1")


def test_a_run_on_the_hub_is_run_again_only_when_its_code_may_run(hub_server, model_run, monkeypatch, tmp_path):
    client.push(model_run, "tiny")
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    assert reproduce("hf://me/tiny", confirm=lambda code: bool(asked.append(code.warning)), console=Console()) is None
    assert "(of hf://me/tiny, SHA-256 " in asked[0]
    with pytest.raises(UsageError, match="there is no directory me/tiny; .*for a repository of the Hub give hf://me/tiny"):
        reproduce("me/tiny", confirm=lambda code: True, console=Console())
    with pytest.raises(SystemExit, match="never run"):
        reproduce("hf://me/tiny", confirm=lambda code: True, console=Console())


@pytest.mark.parametrize("source", ["jepa", "./runs/jepa", "/runs/jepa", "a/b/c", "../jepa", "a/..", Path("me/tiny")])
def test_what_is_no_repository_is_never_asked_for(source):
    assert not client.is_repo(source)


def test_what_was_fetched_is_loaded_without_a_network(hub_server, model_run, monkeypatch):
    client.push(model_run, "tiny", revision="v1")
    client.push(model_run, "tiny")
    vitkit.load("me/tiny")
    asked = len(hub_server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert vitkit.load("me/tiny").classes == ["a", "b"]
    assert len(hub_server.requests) == asked
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids reaching the Hub, and me/tiny is not in the Hub cache"):
        vitkit.load("me/tiny", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_server.close()
    assert vitkit.load("me/tiny").classes == ["a", "b"]
    with pytest.raises(HubError, match=r"for me/other failed \(\w+: .*\); check the network"):
        vitkit.load("me/other")


def test_a_branch_is_made_and_pushed_to(hub_server, model_run, tmp_path):
    client.push(model_run, "tiny")
    (model_run / "recipe.py").write_text('"""Another."""\n')
    done = client.push(model_run, "tiny", revision="v2")
    assert done.url == f"{hub_server.url}/me/tiny/tree/v2"
    assert hub_server.files("me/tiny", "v2")["recipe.py"] == b'"""Another."""\n'
    assert b"never run" in hub_server.files("me/tiny")["recipe.py"]
    where, _ = client.pull("me/tiny", tmp_path / "v2", revision="v2")
    assert (where / "recipe.py").read_text() == '"""Another."""\n'
    commit = hub_server.repos["me/tiny"].refs["main"]
    assert b"never run" in (client.pull("me/tiny", tmp_path / "sha", revision=commit)[0] / "recipe.py").read_bytes()


def test_a_pull_request_to_somebody_else(hub_server, model_run, tmp_path):
    hub_server.tokens["hf_other"] = ("other", True)
    client.push(model_run, "tiny")
    hub_server.repos["other/tiny"] = hub_server.repos.pop("me/tiny")
    (model_run / "recipe.py").write_text('"""Proposed."""\n')
    done = client.push(model_run, "other/tiny", create_pr=True)
    assert done.url == f"{hub_server.url}/other/tiny/discussions/1"
    assert b"never run" in hub_server.files("other/tiny")["recipe.py"]
    where, _ = client.pull("other/tiny", tmp_path / "pr", revision="refs/pr/1")
    assert (where / "recipe.py").read_text() == '"""Proposed."""\n'


def test_pushing_again_sends_what_has_changed_and_says_when_nothing_has(hub_server, model_run):
    client.push(model_run, "tiny")
    sent = list(hub_server.uploads)
    assert client.push(model_run, "tiny").unchanged
    (model_run / "plots" / "losses.png").write_bytes(b"\x89PNG\0 another")
    (model_run / "recipe.py").unlink()
    assert not client.push(model_run, "tiny").unchanged
    assert len(hub_server.uploads) == len(sent) + 1
    assert hub_server.files("me/tiny")["plots/losses.png"] == b"\x89PNG\0 another"
    assert "recipe.py" not in hub_server.files("me/tiny")  # of another run than the rest


def test_a_card_that_was_edited_stays(hub_server, model_run, tmp_path):
    client.push(model_run, "tiny")
    summary = json.loads((model_run / "summary.json").read_text())
    (model_run / "summary.json").write_text(json.dumps({**summary, "seed": 77}))
    assert not client.push(model_run, "tiny").card_kept
    assert b"| seed | 77 |" in hub_server.files("me/tiny")["README.md"]
    edited = hub_server.files("me/tiny")["README.md"].replace(b"| seed | 77 |", b"| seed | seventy-seven |")
    hub_server.put("me/tiny", {**hub_server.files("me/tiny"), "README.md": edited})
    (model_run / "summary.json").write_text(json.dumps({**summary, "seed": 78}))
    assert client.push(model_run, "tiny").card_kept
    assert hub_server.files("me/tiny")["README.md"] == edited
    assert json.loads(hub_server.files("me/tiny")["summary.json"])["seed"] == 78


def test_the_hub_reads_the_card(hub_server, model_run):
    client.push(model_run, "tiny")
    card = ModelCard.load("me/tiny")
    assert card.data.library_name == "vitkit"
    assert card.data.model_name == "tiny"
    assert {result.metric_name: result.metric_value for result in card.data.eval_results}["linear top-1"] > 0.9
    assert any(line.endswith("/api/validate-yaml") for line in hub_server.requests)


def test_a_new_repository_is_private_when_asked_and_an_old_one_is_not_published_by_mistake(hub_server, model_run):
    client.push(model_run, "secret", private=True)
    assert hub_server.repos["me/secret"].private
    client.push(model_run, "secret", private=True)
    client.push(model_run, "open")
    before = hub_server.files("me/open")
    with pytest.raises(HubError, match="me/open exists and is public; --private is for a new repository: make it private"):
        client.push(model_run, "open", private=True)
    assert hub_server.files("me/open") == before


def test_a_name_that_another_model_has_is_left_alone(hub_server, model_run):
    hub_server.put("me/bert", {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"x"})
    with pytest.raises(HubError, match="the name me/bert is taken by a repository that vitkit did not save"):
        client.push(model_run, "bert")
    hub_server.put("me/data", {"data.txt": b"x"})
    with pytest.raises(HubError, match=r"the name me/data is taken .*\(data.txt\); choose another name"):
        client.push(model_run, "data")
    hub_server.put("me/empty", {"README.md": b"# To come\n"})
    assert client.push(model_run, "empty").card_kept


def test_an_upload_that_breaks_once_goes_on_by_itself_and_the_token_stays_with_the_hub(hub_server, model_run):
    hub_server.cuts = 1
    client.push(model_run, "tiny")
    assert sorted(hub_server.files("me/tiny")) == [".gitattributes", *PUBLISHED]
    vitkit.load("me/tiny")
    assert hub_server.strangers
    assert set(hub_server.strangers) == {None}


def test_a_push_that_broke_off_goes_on_with_the_next(hub_server, model_run, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    hub_server.faults.append(Fault(r"PUT /storage/", 500, "trouble", times=1000))
    hub_server.faults.append(Fault(r"POST .*/commit/", 503, "trouble"))
    with pytest.raises(HubError, match=r"the Hub has an internal error: 500.*run the same command again"):
        client.push(model_run, "tiny")
    assert sorted(hub_server.files("me/tiny")) == [".gitattributes"]
    hub_server.faults[0].times = 0
    with pytest.raises(HubError, match=r"the Hub has an internal error: 503 \(trouble\)"):
        client.push(model_run, "tiny")
    assert len(hub_server.uploads) == 3
    client.push(model_run, "tiny")
    assert len(hub_server.uploads) == 3  # nothing is sent twice
    assert sorted(hub_server.files("me/tiny")) == [".gitattributes", *PUBLISHED]


def test_a_connection_that_is_cut_in_the_middle_of_every_upload(hub_server, model_run, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub_server.cuts = 1000
    with pytest.raises(HubError, match=r"the connection to http://127.* for me/tiny failed \(.*files that have arrived are not"):
        client.push(model_run, "tiny")
    hub_server.cuts = 0
    client.push(model_run, "tiny")
    assert sorted(hub_server.files("me/tiny")) == [".gitattributes", *PUBLISHED]


@pytest.mark.slow
def test_the_commands_as_a_person_gives_them(hub_server, model_run, tmp_path):
    """Their own processes, `HF_ENDPOINT` and `HF_TOKEN`; the token is in nothing that was written or sent but headers."""
    token = os.environ["HF_TOKEN"]
    home = tmp_path / "person"
    home.mkdir()
    environment = {
        **os.environ, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_DEBUG": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        found = subprocess.run(
            [sys.executable, *words], cwd=home, env=environment, capture_output=True, text=True, timeout=120
        )
        assert token not in found.stdout + found.stderr
        return found

    pushed = call("-m", "vitkit", "push", str(model_run), "tiny", "--message", "by hand")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[-1] == f"pushed: {hub_server.url}/me/tiny"
    code = "import vitkit; print(vitkit.load('me/tiny').classes)"
    assert call("-c", code).stdout == "['a', 'b']\n"
    assert not any(token.encode() in data for folder in (home, model_run) for data in files_under(folder).values())
    assert not any(token.encode() in body for body in hub_server.bodies)
