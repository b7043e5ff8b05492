"""The promises of vitkit/cli/README.md: which commands run foreign code, and which contact the network."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parents[3] / "vitkit" / "cli" / "README.md"
WATCHED = textwrap.dedent(
    """
    import contextlib, io, json, shlex, sys

    events = []

    def watch(event, arguments):
        if event in ("socket.getaddrinfo", "socket.connect", "os.exec", "os.system", "pty.spawn", "webbrowser.open"):
            events.append(f"{event} {arguments[:2]!r:.100}")
        if event == "compile" and str(arguments[1]).endswith("recipe.py") and "vitkit/training" not in str(arguments[1]):
            events.append(f"compile {arguments[1]}")

    sys.addaudithook(watch)
    from vitkit.cli.main import main

    answers = []
    for line in sys.stdin.read().splitlines():
        sys.argv, events[:] = ["vitkit", *shlex.split(line)], []
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                main()
            except SystemExit as leaving:
                answers.append([line, leaving.code, list(events), printed.getvalue()])
    print(json.dumps(answers), file=sys.__stdout__)
    """
)


def watched(lines, folder):
    """Exit code and watched events of each command line, in one other process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VITKIT_DATA": str(folder / "store"), "HF_TOKEN": "hf_" + "x" * 34}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody answers there
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], input="\n".join(lines), cwd=folder, capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_commands_on_local_files_contact_nothing_and_run_no_recipe(model_run, tmp_path):
    (model_run / "recipe.py").write_text("raise AssertionError('the recipe of the model ran')")
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for index in range(5):
            Image.new("L", (9, 9), 40 * index).save(tmp_path / "pets" / label / f"{index}.png")
    lines = [
        "--help", "--version", "list", "data list", "doctor", "show head linear", "check linear", "new recipe mine",
        "new plugin my-own-head --kind head", "data import pets --name pets", "data get digits",
        "embed jepa pets -o features.safetensors", "attend jepa pets --out attention.png",
        "eval jepa --dataset digits --evaluator knn --arg train_size=100 -o scores.json",
        "export jepa --format torch-export -o jepa.pt2", "push jepa me/jepa --dry-run", "compare jepa copy --out page.html",
    ]  # fmt: skip
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("summary.json", "losses.csv", "metrics.csv"):
        (copy / name).write_text((model_run / name).read_text())
    for line, code, events, printed in watched(lines, tmp_path):
        assert code == 0, f"{line}: {printed}"
        assert events == [], line


@pytest.mark.parametrize("flags", ["", "--yes", "--trust-remote-code"])
def test_reproducing_a_missing_directory_contacts_nothing(tmp_path, flags):
    ((_, code, events, _),) = watched([f"reproduce runs/jepa {flags}"], tmp_path)
    assert (code, events) == (2, [])


def test_the_hub_is_contacted_where_it_is_asked_for(tmp_path):
    """The other tests would notice a contact."""
    for line, code, events, printed in watched(["reproduce hf://some/run --yes", "pull some/run"], tmp_path):
        assert (code, bool(events)) == (1, True), f"{line}: {printed}"


def test_the_readme_names_every_command(shell):
    from vitkit.cli.main import app

    names = {command.name for command in app.registered_commands} | {"sample", "interpolate", "reconstruct", "search", "new"}
    names |= {"data list", "data get", "data import"}
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## Per command") : text.index("## Rules")]
    assert sorted(name for name in names if f"`{name}" not in table) == []
