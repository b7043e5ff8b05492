"""A recipe under torchrun and accelerate's launcher: two processes, one run directory, and one end where a rank dies."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vitkit

FLAGS = ("--dataset", "digits", "--epochs", "1", "--emb-dim", "16", "--depth", "1", "--num-heads", "2", "--train-size", "70",
         "--batch-size", "8", "--grad-accum", "2", "--device", "cpu", "--precision", "fp32")  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
LAUNCHERS = {
    "torchrun": (TORCHRUN, "ddp"),
    "accelerate": ((*ACCELERATE, "--multi_gpu"), "ddp"),
    "accelerate-fsdp2": ((*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
                          "--fsdp_transformer_layer_cls_to_wrap", "Block"), "fsdp"),
}  # fmt: skip


def launch(launcher: tuple[str, ...], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "vitkit", "run", *arguments], cwd=cwd, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_make_one_run(name, tmp_path):
    launcher, parallel = LAUNCHERS[name]
    done = launch(launcher, str(Path(__file__).parents[2] / "recipes" / "jepa_mnist.py"), *FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (directory,) = (tmp_path / "runs" / "jepa_mnist").iterdir()
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["settings"]["processes"], summary["settings"]["parallel"]) == (2, parallel)
    assert summary["steps"] == 2  # 70 images: four batches of 8 + 8, two a step
    assert summary["protocols"]["linear_top1"]["samples"] == 382
    assert done.stderr.count("epoch 1/1") == 1
    model = vitkit.load(directory)
    assert bool(model.encode_image(model.preprocess(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))).isfinite().all())


DYING = '''
"""One of two ranks dies in its third step, or none does."""
import os
import signal
import time
from pathlib import Path
import torch
from vitkit import Run

class Batches:
    def __len__(self):
        return 50
    def epoch(self, number, *, seed=0, start=0, device="cpu", rank=0, world=1):
        for index in range(start, 50):
            yield {"images": torch.ones(4, 3), "labels": torch.ones(4), "index": torch.tensor([index])}

class Dying(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.net, self.how = torch.nn.Linear(3, 1), how
    def forward(self, batch):
        if self.how != "live" and int(batch["index"]) == 2 and os.environ["RANK"] == "1":
            Path("died").write_text(str(time.time()))
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("rank one can do no more")
        return {"loss": (self.net(batch["images"])[:, 0] - batch["labels"]).square().mean()}

def main(run: Run, how: str = "kill"):
    model = Dying(how)
    for epoch in run.fit(model, Batches(), epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)):
        epoch.log(a=1.0)
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "rank 1: ArithmeticError: rank one can do no more"), ("kill", "it left no message: its process was killed")],
)
def test_when_a_rank_dies_the_other_stops_within_a_minute_and_says_why(how, said, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    done = launch(TORCHRUN, "dying.py", "--how", how, "--device", "cpu", "--out", "run", cwd=tmp_path)
    took = time.time() - float((tmp_path / "died").read_text())
    assert done.returncode != 0
    assert f"rank 0: another rank has failed, so this one stops: {said}" in done.stderr
    assert "--out run --resume" in done.stderr
    assert f"another rank has failed, so this one stops: {said}" in (tmp_path / "run" / "log.txt").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert took < 60


@pytest.mark.slow
def test_two_machines_make_one_run(tmp_path):
    """A launcher on each of two machines, which are both this one."""
    (tmp_path / "dying.py").write_text(DYING)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
               "--master-port", str(port), "-m", "vitkit", "run", "dying.py", "--how", "live", "--device", "cpu",
               "--out", "run"]  # fmt: skip
    machines = [
        subprocess.Popen([*command[:3], "--node-rank", str(number), *command[3:]], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
        for number in range(2)
    ]  # fmt: skip
    said = [machine.communicate(timeout=600)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["settings"]["processes"], summary["steps"]) == ("finished", 2, 50)
    assert [text.count("epoch 1/1") for text in said] == [1, 0]
