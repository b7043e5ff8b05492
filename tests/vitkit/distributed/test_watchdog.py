"""What ranks know of each other: an error that one of them tells, and a silence."""

import os
import subprocess
import sys
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
