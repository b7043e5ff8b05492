"""Under torchrun: rank 0 is killed, or the launcher itself."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

RECIPE = '''
"""Two ranks train; rank 0 may be killed in its third step."""
import os
import signal
import time
from pathlib import Path
import torch
from vitkit import Run

class Batches:
    def __len__(self):
        return 100_000
    def epoch(self, number, *, seed=0, start=0, device="cpu", rank=0, world=1):
        for index in range(start, 100_000):
            yield {"images": torch.ones(4, 3), "index": torch.tensor([index])}

class Model(torch.nn.Module):
    def __init__(self, kill):
        super().__init__()
        self.net, self.kill = torch.nn.Linear(3, 1), kill
    def forward(self, batch):
        if int(batch["index"]) == 2:
            Path(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
            if self.kill and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return {"loss": self.net(batch["images"]).square().mean()}

def main(run: Run, kill: bool = False):
    model = Model(kill)
    for epoch in run.fit(model, Batches(), epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)):
        epoch.log(a=1.0)
'''
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitkit", "run", "small.py",
           "--device", "cpu", "--precision", "fp32", "--out", "run"]  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_surviving_rank_writes_the_line_that_rank_0_can_no_longer_write(tmp_path):
    (tmp_path / "small.py").write_text(RECIPE)
    done = subprocess.run([*COMMAND, "--kill"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "rank 1: another rank has failed, so this one stops: it left no message: its process was killed, or its machine stopped" in log
    assert "--out run --resume" in log
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_a_checkpoint_and_end(tmp_path):
    (tmp_path / "small.py").write_text(RECIPE)
    with (tmp_path / "out").open("w") as out, subprocess.Popen(COMMAND, cwd=tmp_path, env=ENVIRONMENT, stderr=out) as launcher:
        wait_for(lambda: all((tmp_path / f"pid-{rank}").exists() and (tmp_path / f"pid-{rank}").read_text() for rank in range(2)))
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        try:
            wait_for(lambda: not any(map(is_alive, pids)))
        finally:
            for pid in filter(is_alive, pids):
                os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert "stopped; resume with the same launcher" in (tmp_path / "run" / "log.txt").read_text()
