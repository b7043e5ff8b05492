"""What goes wrong between a run and the Hub: each message says the way out, and no token is in it."""

import json
import os
from pathlib import Path

import pytest
from hub_server import Fault
from typer.testing import CliRunner

import vitkit
from vitkit.cli.main import app, guarded
from vitkit.errors import CheckpointError, HubError, UsageError
from vitkit.hub import client

# The client's own, of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_no_token(hub_server, model_run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no access token for the Hub: make one .*/settings/tokens, then `hf auth login`"):
        client.push(model_run, "tiny")
    assert hub_server.requests == []


def test_a_token_that_has_expired(hub_server, model_run):
    hub_server.tokens.clear()
    with pytest.raises(HubError, match="does not accept your access token: it is invalid or has expired") as caught:
        client.push(model_run, "tiny")
    assert os.environ["HF_TOKEN"] not in str(caught.value)


def test_a_token_that_may_only_read_and_a_name_of_somebody_else(hub_server, model_run):
    with pytest.raises(HubError, match=r"your access token does not permit access to you/tiny \(You don't have the rights to"):
        client.push(model_run, "you/tiny")
    client.push(model_run, "tiny")
    hub_server.tokens[os.environ["HF_TOKEN"]] = ("me", False)
    (model_run / "recipe.py").write_text("pass\n")
    with pytest.raises(HubError, match=r"does not permit access to me/tiny .*take a token that may write .* --create-pr"):
        client.push(model_run, "tiny")
    assert b"never run" in hub_server.files("me/tiny")["recipe.py"]


def test_a_repository_that_is_not_there_private_or_gated(hub_server, model_run, tmp_path):
    there = r"there is no repository you/tiny on the Hub, or it is private and your token may not see it"
    for ask in (lambda: client.pull("you/tiny", tmp_path / "x"), lambda: vitkit.load("you/tiny")):
        with pytest.raises(HubError, match=there):
            ask()
    with pytest.raises(HubError, match=there):
        client.push(model_run, "you/tiny", create_pr=True)
    client.push(model_run, "tiny")
    hub_server.put("you/tiny", hub_server.files("me/tiny"), private=True)
    with pytest.raises(HubError, match=there):
        vitkit.load("you/tiny")
    hub_server.put("you/gated", hub_server.files("me/tiny"), gated=True)
    with pytest.raises(HubError, match="you/gated is gated: ask for access on its page"):
        vitkit.load("you/gated")
    with pytest.raises(HubError, match="me/tiny has no branch, tag or commit 'v9'"):
        client.pull("me/tiny", tmp_path / "x", revision="v9")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (409, r"me/tiny was changed by another push \(said \*\*\*\); run the same command again"),
        (413, "me/tiny is too large for the Hub"),
        (429, "the Hub asks to slow down .*wait a few minutes and run the same command again"),
        (502, "the Hub has an internal error: 502 .*wait a little and run the same command again"),
        (418, r"the Hub refused me/tiny: 418 \(said \*\*\*\)"),
    ],
)
def test_what_the_hub_answers(hub_server, model_run, status, told):
    hub_server.faults.append(Fault("POST .*/commit/", status, f"said {os.environ['HF_TOKEN']}"))
    with pytest.raises(HubError, match=told) as caught:
        client.push(model_run, "tiny")
    assert os.environ["HF_TOKEN"] not in str(caught.value)


def test_what_the_client_of_the_newer_storage_raises(hub_server, model_run, monkeypatch):
    denied = type("XetAuthenticationError", (PermissionError,), {"__module__": "hf_xet"})
    for error, told in (
        (ConnectionError("Network error: reset"), r"failed \(ConnectionError: Network error: reset\); check the network"),
        (denied("no"), "your access token does not permit access to me/tiny: "),
    ):

        def fail(*arguments, error=error, **keywords):
            raise error

        monkeypatch.setattr(client.HfApi, "create_commit", fail)
        with pytest.raises(HubError, match=told):
            client.push(model_run, "tiny")


def test_a_fault_of_ones_own_is_not_called_the_hubs(hub_server, model_run, monkeypatch):
    def fail(*arguments, **keywords):
        raise KeyError("a bug")

    monkeypatch.setattr(client.HfApi, "create_commit", fail)
    with pytest.raises(KeyError, match="a bug"):
        client.push(model_run, "tiny")


def test_no_network(hub_server, model_run, tmp_path):
    hub_server.close()
    for ask in (lambda: client.push(model_run, "me/tiny"), lambda: client.pull("me/tiny", tmp_path / "x")):
        with pytest.raises(HubError, match=r"the connection to http://\S+ for me/tiny failed \(\w+: .*check the network"):
            ask()


@pytest.mark.parametrize("name", ["a/b/c", "me/", "-me/x", "me/a..b", "me/a b", "me/" + "x" * 100, "../x"])
def test_names_that_no_repository_has(model_run, name):
    with pytest.raises(UsageError, match="is no name of a Hub repository"):
        client.push(model_run, name)


def test_a_mistyped_directory_is_answered_with_the_one_beside_it(hub_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/small").mkdir(parents=True)
    with pytest.raises(HubError, match=r"no directory runs/smal; did you mean 'runs/small'\? It was searched on the Hub: there is no"):
        vitkit.load("runs/smal")
    with pytest.raises(HubError, match=r"no directory runs/other, so it was searched on the Hub: there is no"):
        vitkit.load("runs/other")


def test_directories_that_hold_no_run_or_no_model(tmp_path, model_run):
    with pytest.raises(UsageError, match="holds no summary.json; give the directory of a run, such as runs/jepa"):
        client.push(tmp_path / "nowhere", "tiny")
    (model_run / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="has 3 bytes, its config says"):
        client.push(model_run, "tiny")
    (model_run / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config.json: no model was saved there, or its run has not ended"):
        client.push(model_run, "tiny")


SECRETS = [
    ("hf_" + "Aa1" * 12, "a Hugging Face token"),
    ("ghp_" + "A1b2" * 9, "a GitHub token"),
    ("github_pat_" + "a1_B" * 10, "a GitHub token"),
    ("sk-proj-" + "ab1C" * 10, "an OpenAI or Anthropic key"),
    ("AKIA" + "IOSF0DNN7EXAMPLE", "an AWS key"),
    ("xoxb-" + "123456789012-abcdef", "a Slack token"),
    ("AIza" + "Sy0_-" * 7, "a Google key"),
    ("Authorization: Bearer abcdefgh1234", "credentials of a request"),
    ('{"Authorization": "Basic YWJjOmRlZg=="}', "credentials of a request"),
    ("https://me:pa55word@host.org/data", "credentials in an address"),
    ("https://0123456789abcdefghij0@github.com/me/x", "credentials in an address"),
    ("s3://b/x?X-Amz-Signature=0123456789abcdef", "a token in an address"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    ("password = 'correct-horse-battery'", "a password or key"),
    ("vitkit run x.py --wandb-api-key 0123456789abcdef", "a password or key of a command"),
]
HARMLESS = [
    "https://host:8080/x", "token_embed = nn.Embedding(10, 3)", "tokens = 'cls patches registers'", "me@example.org",
    "--extra-tokens 5", "sk-learn-a-name-that-is-rather-long", "hf_hub_download(repo_id, filename)", "max_tokens: 4096",
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind"), SECRETS, ids=[kind for _, kind in SECRETS])
@pytest.mark.parametrize("file", ["recipe.py", "summary.json", "metrics.csv"])
def test_secrets_of_every_kind_are_not_published_and_not_repeated(hub_server, model_run, file, text, kind):
    if file == "summary.json":
        summary = json.loads((model_run / file).read_text())
        (model_run / file).write_text(json.dumps({**summary, "note": text.replace('"', "'")}, indent=1))
    else:
        (model_run / file).write_text(f"first line\n{text}\n")
    with pytest.raises(HubError, match=rf"{file} holds what looks like .*; take it out .*: line \d+, {kind}, .*allow_secrets") as caught:
        client.push(model_run, "tiny")
    assert text[8:] not in str(caught.value)
    assert not hub_server.requests
    assert client.plan(model_run, "tiny", allow_secrets=True).files[file]


def test_text_that_only_resembles_a_secret_is_published(model_run):
    (model_run / "metrics.csv").write_text("\n".join(HARMLESS))
    assert client.plan(model_run, "tiny").files["metrics.csv"]


def test_a_link_a_file_too_large_and_a_token_in_a_file_are_not_published(model_run, tmp_path):
    (tmp_path / "private.csv").write_text("secret\n")
    (model_run / "metrics.csv").unlink()
    (model_run / "metrics.csv").symlink_to(tmp_path / "private.csv")
    with pytest.raises(HubError, match=r"metrics\.csv is a link; only a run's own files are published"):
        client.plan(model_run, "tiny")
    (model_run / "metrics.csv").unlink()
    (model_run / "recipe.py").write_text(f"TOKEN = '{os.environ.get('HF_TOKEN', 'hf_' + 'Aa1' * 12)}'\n")
    with pytest.raises(HubError, match=r"recipe\.py holds what looks like an access token; take it out"):
        client.plan(model_run, "tiny")
    (model_run / "recipe.py").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(HubError, match=r"recipe\.py has 1,048,577 bytes; 1,048,576 at most are published"):
        client.plan(model_run, "tiny")


def test_a_directory_that_is_there_is_not_written_over(hub_server, model_run, tmp_path):
    client.push(model_run, "tiny")
    (tmp_path / "mine").mkdir()
    client.pull("me/tiny", tmp_path / "mine")  # an empty one is as good as none
    with pytest.raises(UsageError, match=r"mine exists already; choose another directory with -o, or remove it"):
        client.pull("me/tiny", tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="link exists already"):
        client.pull("me/tiny", tmp_path / "link")


def test_dry_run_shows_every_file_and_the_card_and_asks_nobody(hub_server, model_run):
    found = CliRunner().invoke(app, ["push", str(model_run), "tiny", "--dry-run"])
    assert found.exit_code == 0, found.output
    for name in ("model.safetensors", "config.json", "recipe.py", "plots/losses.png", "README.md"):
        assert f"  {name}\n" in found.output
    assert "log.txt" not in found.output
    assert "for OWNER/tiny" in found.output
    assert "# tiny" in found.output
    assert hub_server.requests == []


def test_the_commands(hub_server, model_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    assert f"pushed: {hub_server.url}/me/tiny\n" in run.invoke(app, ["push", str(model_run), "tiny"]).output
    hub_server.put("me/tiny", {**hub_server.files("me/tiny"), "README.md": b"mine", "weights.pt": b"x", "\x1b[31m.pt": b"x"})
    pushed = run.invoke(app, ["push", str(model_run), "tiny"]).output
    assert "README.md of the repository was edited by hand, so it stays" in pushed
    assert "nothing has changed: http://" in pushed
    pulled = run.invoke(app, ["pull", "me/tiny", "-o", "here"]).output
    assert "left out, not a file of a run: 'weights.pt'\n" in pulled
    assert "left out, not a file of a run: '\\x1b[31m.pt'\n" in pulled
    assert "pulled me/tiny into here; vitkit.load('here') loads its model\n" in pulled
    assert not Path("here/weights.pt").exists()
    code = guarded(lambda: app(["pull", "me/other"], prog_name="vitkit"), debug=False)
    assert code == 1
    assert "error: there is no repository me/other on the Hub" in capsys.readouterr().err
