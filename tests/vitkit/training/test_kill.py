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
from collections import Counter

import pytest
from safetensors.torch import load_file

KINDS = ("moment", "file", "download", "step", "evaluation", "save")
"""A kill at any moment, at a file that takes its place, or at a moment within one of the things that a run does."""
KILLS = int(os.environ.get("VITKIT_KILLS", "16"))
RECIPE = '''
"""A small classifier of digits, with everything that a run can keep."""
import builtins
import time
import torch
from vitkit import Run, Scores, datasets, heads
from vitkit.transforms.augment import RandomAffine
from vitkit.contracts import Measurement
from vitkit.data.dataset import fetched, from_store
from vitkit.training.optim import warmup_cosine

class Classifier(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.drop = head, torch.nn.Dropout(0.2)
    def forward(self, batch):
        if self.training:
            builtins.doing("step")
        logits = self.head(self.drop(batch["images"].flatten(1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, batch["labels"])}

def download():
    builtins.doing("download")
    digits = datasets.build("digits")
    time.sleep(0.05)
    parts = [(split, part) for split in ("train", "test") for part in ("images", "labels")]
    return {f"{split}.{part}": getattr(getattr(digits, split), part) for split, part in parts}, digits.classes

def shelf():
    """Digits that have to be fetched."""
    return from_store(fetched("shelf", download), source="scikit-learn", licence="CC BY 4.0")

def main(run: Run, epochs: int = 4, pause: float = 0.02):
    if "shelf" not in datasets:
        datasets.add("shelf", shelf)
    data = run.dataset("shelf", default="digits")
    batches = data.train.stratified_subset(256).batches(32, shuffle=True, augment=RandomAffine(degrees=10))
    model = Classifier(heads.build("mlp", in_dim=64, out_dim=10, norm="batch"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = warmup_cosine(optimizer, epochs * len(batches), warmup=4)
    fit = run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, ema=0.9, monitor="val_top1")
    for epoch in fit:
        model.eval()
        builtins.doing("evaluation")
        time.sleep(pause)
        with torch.no_grad():
            test = next(iter(data.test.batches(382).epoch(0)))
            hits = (model.head(test["images"].flatten(1)).argmax(1) == test["labels"]).float().mean()
        time.sleep(pause)
        epoch.log(Scores({"val_top1": hits}, protocols={"val_top1": Measurement("val", 382, chance=0.1)}))
        model.train()
    run.save(classifier=model.head)
'''
SERVER = '''
import builtins, json, os, signal, sys, threading, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from vitkit.cli.run import run
from vitkit import data, heads
from vitkit.report import curves
from vitkit.training import loop
# What each attempt would import and load anew, for a second and more.
data.build("digits")
heads.build("mlp", in_dim=2, out_dim=2)
import matplotlib.figure
matplotlib.figure.Figure().savefig(os.devnull, format="png")
os.fsync = lambda _: None  # what a killed process has written stays in the system's hands; only a power failure loses it
curves.pace = curves.metrics = curves.bars = lambda record: None  # one plot stands for all: drawing takes longer than the run

def attempt(order):
    """The child: `vitkit run`, with a kill at the n-th file that takes its place, just before or just after."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    loop.CHECKPOINT_SECONDS = order["checkpoint_seconds"]
    os.environ["VITKIT_DATA"] = order["store"]
    def doing(what):
        """A moment of this is the last one, where that is the order."""
        if what == order["doing"]:
            threading.Timer(order["seconds"], os.kill, (os.getpid(), signal.SIGKILL)).start()
            order["doing"] = None
    builtins.doing = doing
    save_state = loop.save_state
    loop.save_state = lambda *a, **k: (doing("save"), save_state(*a, **k))
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
        run(Path(order["recipe"]), order["arguments"])
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
    order["timed"] = order["doing"] is not None
    child = os.fork()
    if child == 0:
        attempt(order)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if order["seconds"] is not None and not order["timed"] and time.monotonic() - began > order["seconds"]:
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

    def run(self, directory, *flags, seconds=None, doing=None, file=0, before=True, checkpoint_seconds=300.0, count=None):
        store = directory.with_name(f"{directory.name}-store")
        order = {
            "recipe": str(self.recipe), "arguments": ["--out", str(directory), "--precision", "fp32", *flags],
            "log": str(self.log), "seconds": seconds, "file": file, "before": before,
            "checkpoint_seconds": checkpoint_seconds, "count": str(count) if count else None, "doing": doing, "store": str(store),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        give_up = time.monotonic() + 120
        while True:
            self.read += look_through(directory) + look_through(store)
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
                load_file(path)
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
    kinds, chains = Counter(), 0
    while kinds.total() < KILLS or chains == 0:
        directory, attempts = tmp_path / f"chain{chains}", []
        for _ in range(100):
            plan, kind = {"checkpoint_seconds": luck.choice([0.0, 0.05, 300.0])}, ""
            if kinds.total() < KILLS and len(attempts) < 10:  # a chain ends when an attempt gets through
                kind = KINDS[kinds.total() % len(KINDS)]
            if kind == "moment":
                plan["seconds"] = luck.uniform(0, 0.7 * whole["seconds"])
            elif kind == "file":
                plan |= {"file": luck.randint(1, files), "before": luck.random() < 0.5}
            elif kind:
                plan |= {"doing": kind, "seconds": luck.uniform(0, 0.1 if kind in ("download", "evaluation") else 0.01)}
            if kind == "download":  # another machine may have no copy yet
                (tmp_path / f"chain{chains}-store" / "shelf.safetensors").unlink(missing_ok=True)
            begun = (directory / "summary.json").exists()  # before, there is nothing to go on with
            answer = server.run(directory, *(["--resume"] if begun else []), **plan)
            attempts.append(plan)
            if answer["killed"]:
                kinds[kind] += 1
            else:
                assert answer["code"] == 0, f"{attempts}\n{server.log.read_text()[-4000:]}"
                break
        found = outcome(directory)
        for key, value in expected.items():
            assert found[key] == value, (key, attempts)
        chains += 1
    assert server.read > 100
    assert set(kinds) == set(KINDS)
    print(f"{dict(kinds)} kills of {chains} runs of {files} files, {server.read} readings of files")
