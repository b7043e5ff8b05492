"""Killed with SIGKILL at random moments, again and again, and resumed: nothing is lost, and no file is ever in pieces.

A server that has torch imported forks a process for each attempt. `VITKIT_KILLS` says how many kills there are.
"""

import csv
import json
import os
import random
import subprocess
import sys
import time

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

KILLS = int(os.environ.get("VITKIT_KILLS", "16"))
RECIPE = '''
"""A small classifier of digits, with everything that a run can keep."""
import time
import torch
from vitkit import Run, Scores, heads
from vitkit.augment import RandomAffine
from vitkit.contracts import Measurement
from vitkit.optim import warmup_cosine

class Classifier(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.drop = head, torch.nn.Dropout(0.2)
    def forward(self, batch):
        logits = self.head(self.drop(batch["images"].flatten(1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, batch["labels"])}

def main(run: Run, epochs: int = 4, pause: float = 0.02):
    data = run.dataset("digits", default="digits")
    batches = data.train.take(256).batches(32, shuffle=True, augment=RandomAffine(degrees=10))
    model = Classifier(heads.build("mlp", in_dim=64, out_dim=10, norm="batch"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = warmup_cosine(optimizer, epochs * len(batches), warmup=4)
    fit = run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, ema=0.9, monitor="top1")
    for epoch in fit:
        model.eval()
        time.sleep(pause)
        with torch.no_grad():
            test = next(iter(data.test.batches(355).epoch(0)))
            hits = (model.head(test["images"].flatten(1)).argmax(1) == test["labels"]).float().mean()
        time.sleep(pause)
        epoch.log(Scores({"top1": hits}, protocols={"top1": Measurement("test", 355, chance=0.1)}))
        model.train()
    run.save(classifier=model.head)
'''
SERVER = '''
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from vitkit import cli_run, data, fit, heads, report
from vitkit import run as _
# What each attempt would import and load anew, for a second and more.
data.build("digits")
heads.build("mlp", in_dim=2, out_dim=2)
import matplotlib.figure
matplotlib.figure.Figure().savefig(os.devnull, format="png")
os.fsync = lambda _: None  # what a killed process has written stays in the system's hands; only a power failure loses it
curves = report._curves
report._curves = lambda record: curves(record)[:1]  # one plot stands for all: drawing them takes longer than the run

def attempt(order):
    """The child: `vitkit run`, with a kill at the n-th file that takes its place, just before or just after."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    fit.CHECKPOINT_SECONDS = order["checkpoint_seconds"]
    replaced, replace = [], os.replace
    def counting(source, target):
        replaced.append(target)
        if len(replaced) == order["file"] and order["before"]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if len(replaced) == order["file"]:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = counting
    try:
        cli_run.run(Path(order["recipe"]), order["arguments"])
    except SystemExit as leaving:
        if order["count"]:
            Path(order["count"]).write_text(str(len(replaced)))
        os._exit(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        attempt(order)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if order["seconds"] is not None and time.monotonic() - began > order["seconds"]:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    killed = os.WIFSIGNALED(status)
    answer = {"killed": killed, "code": None if killed else os.WEXITSTATUS(status), "seconds": time.monotonic() - began}
    print(json.dumps(answer), flush=True)
'''


class Server:
    """Attempts, one at a time; while one runs, its directory's files are read over and over."""

    def __init__(self, folder):
        self.recipe, self.log, self.read = folder / "small.py", folder / "log.txt", 0
        self.recipe.write_text(RECIPE)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout.readline() == "ready\n"
        os.set_blocking(self.process.stdout.fileno(), False)

    def run(self, directory, *flags, seconds=None, file=0, before=True, checkpoint_seconds=300.0, count=None):
        order = {
            "recipe": str(self.recipe), "arguments": ["--out", str(directory), "--precision", "fp32", *flags],
            "log": str(self.log), "seconds": seconds, "file": file, "before": before,
            "checkpoint_seconds": checkpoint_seconds, "count": str(count) if count else None,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        give_up = time.monotonic() + 120
        while True:
            self.read += look_through(directory)
            line = self.process.stdout.readline()
            if line:
                return json.loads(line)
            assert self.process.poll() is None, "the server has died"
            assert time.monotonic() < give_up, f"no end to it: {self.log.read_text()}"
            time.sleep(0.1)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def look_through(directory):
    """Read every file of a run that is there under its name; how many."""
    count = 0
    for path in sorted(directory.rglob("*")) if directory.exists() else []:
        if path.name.startswith(".") or path.is_dir():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                with path.open(newline="") as file:
                    rows = list(csv.reader(file))
                assert rows, path
                assert {len(row) for row in rows} == {len(rows[0])}, path
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                        file.get_tensor(name)
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>"), path
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), path
            elif path.name == "recipe.py":
                assert path.read_text() == RECIPE
            count += 1
        except FileNotFoundError:
            continue  # replaced or removed between listing and opening
    return count


def outcome(directory):
    """All that a run leaves behind but times and paths."""
    summary = json.loads((directory / "summary.json").read_text())
    tables = {}
    for name in ("metrics.csv", "losses.csv"):
        with (directory / name).open(newline="") as file:
            rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)]
        tables[name] = rows
    states = {path.name: load_file(path) for path in sorted((directory / "checkpoints").iterdir())}
    return {
        "model": (directory / "model.safetensors").read_bytes(),
        "config": json.loads((directory / "config.json").read_text()),
        "summary": {key: summary[key] for key in ("status", "final", "best", "epochs", "steps", "protocols", "arguments", "dataset")},
        "states": {name: {key: value.tolist() for key, value in state.items()} for name, state in states.items()},
        "files": sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()),
        **tables,
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("kill"))
    yield made
    made.close()


@pytest.mark.slow
def test_killed_anywhere_and_resumed_a_run_ends_bit_for_bit_as_an_undisturbed_one(server, tmp_path):
    whole = server.run(tmp_path / "whole", count=tmp_path / "count")
    assert whole["code"] == 0, server.log.read_text()
    files = int((tmp_path / "count").read_text())
    expected, luck = outcome(tmp_path / "whole"), random.Random(0)
    killed = chains = 0
    while killed < KILLS or chains == 0:
        directory, attempts = tmp_path / f"chain{chains}", []
        for _ in range(100):
            # Half of them at a moment, half at a file; a chain ends when an attempt gets through.
            more = killed < KILLS and len(attempts) < 10
            plan = {"checkpoint_seconds": luck.choice([0.0, 0.05, 300.0])}
            if more and luck.random() < 0.5:
                plan["seconds"] = luck.uniform(0, 0.7 * whole["seconds"])
            elif more:
                plan |= {"file": luck.randint(1, files), "before": luck.random() < 0.5}
            begun = (directory / "summary.json").exists()  # before, there is nothing to go on with
            answer = server.run(directory, *(["--resume"] if begun else []), **plan)
            attempts.append(plan)
            killed += answer["killed"]
            if not answer["killed"]:
                assert answer["code"] == 0, f"{attempts}\n{server.log.read_text()[-4000:]}"
                break
        found = outcome(directory)
        for key, value in expected.items():
            assert found[key] == value, (key, attempts)
        chains += 1
    assert server.read > 100
    print(f"{killed} kills of {chains} runs of {files} files, {server.read} readings of files")
