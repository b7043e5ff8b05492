"""What ranks know of each other: an error that one of them tells, and a silence."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from vitkit.distributed.watchdog import RankWatchdog, is_collective


def test_one_process_has_no_peers() -> None:
    watchdog = RankWatchdog(print)
    watchdog.moved()
    watchdog.tell(ValueError("nobody hears it"))
    assert watchdog.failure(wait=5.0) == ""
    watchdog.close()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4000"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_of_collectives_are_told_from_others(error: Exception, answer: bool) -> None:
    assert is_collective(error) is answer


def _failing(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    watchdog = RankWatchdog(print)
    if rank == 1:
        watchdog.tell(ValueError("rank one has had enough"))
        watchdog.tell(KeyError("what came of it"))
        assert watchdog.failure() == ""  # its own
    else:
        assert watchdog.failure(wait=60.0) == "rank 1: ValueError: rank one has had enough"
    torch.distributed.barrier()
    watchdog.close()
    torch.distributed.destroy_process_group()


def test_the_first_error_of_a_rank_is_known_to_the_others(tmp_path: Any) -> None:
    mp.spawn(_failing, (str(tmp_path),), nprocs=2)


SILENT = """
import os, signal, sys, time
import torch
from vitkit.distributed import watchdog
rank = int(sys.argv[1])
watchdog.BEAT_SECONDS, watchdog.SILENT_SECONDS, watchdog.GRACE_SECONDS = 0.1, 2.0, 0.2
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
seen = watchdog.RankWatchdog(lambda text: print(text, file=sys.stderr))
torch.distributed.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
torch.distributed.barrier()
print("it came back")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_a_rank_that_falls_silent_is_given_up_though_no_collective_returns(tmp_path: Any) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", SILENT, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]  # fmt: skip
    try:
        out, err = ranks[0].communicate(timeout=300)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
        ranks[0].kill()
    assert ranks[0].returncode == 1
    assert "nothing was heard of rank 1 for 2 s, so this one stops" in err
    assert out == ""


ORPHAN = """
import os, subprocess, sys, time
if sys.argv[1] == "launcher":
    for rank in range(2):
        environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
        subprocess.Popen([sys.executable, __file__, str(rank), sys.argv[2]], env=environment)
    time.sleep(600)
import signal, threading
import torch
from vitkit.distributed import watchdog
rank, stopped = int(sys.argv[1]), threading.Event()
watchdog.BEAT_SECONDS, watchdog.GRACE_SECONDS = 0.1, 0.5
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
seen = watchdog.RankWatchdog(print)
torch.distributed.barrier()
open(f"{sys.argv[2]}/{rank}.ready", "w").close()
while not stopped.is_set():
    time.sleep(0.05)
    seen.moved()  # it gets on well without its launcher
open(f"{sys.argv[2]}/{rank}.saved", "w").close()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no parent process that can be lost")
def test_ranks_whose_launcher_was_killed_save_and_stop(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    launcher = subprocess.Popen([sys.executable, str(script), "launcher", str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"})

    def wait_for(suffix: str) -> bool:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and len(list(tmp_path.glob(f"*.{suffix}"))) < 2:
            time.sleep(0.1)
        return len(list(tmp_path.glob(f"*.{suffix}"))) == 2

    try:
        assert wait_for("ready")
    finally:
        launcher.kill()
        launcher.wait()
    assert wait_for("saved")
