"""A run that is disturbed: full and read-only disks, damaged checkpoints, clocks, other processes."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from vitkit import Run
from vitkit.errors import CheckpointError, RunDirectoryError, RunError
from vitkit.runs.directory import LAST
from vitkit.training.checkpoint import load_state


class Points:
    """Three batches of points on a noisy line."""

    def __len__(self):
        return 3

    def epoch(self, number, *, seed=0, start=0, device="cpu", rank=0, world=1):
        for index in range(start, 3):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(100 * number + index))
            yield {"images": x, "labels": x.sum(1)}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, batch):
        return {"loss": (self.net(batch["images"]).squeeze(1) - batch["labels"]).square().mean()}


def train(out: Path, *, resume: bool = False, epochs: int = 3) -> dict[str, torch.Tensor]:
    """The weights after a run, which lets its directory go however it ends."""
    run = Run(out, device="cpu", precision="fp32", resume=resume)
    try:
        torch.manual_seed(0)
        model = Line()
        for epoch in run.fit(model, Points(), epochs=epochs, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2)):
            epoch.log(weight=float(model.net[0].weight.detach().sum()))
    finally:
        run.close()
    return model.state_dict()


def refuse_sync(monkeypatch, number: int, *, after: int, count: list[int]) -> None:
    """From the `after`-th write on every one fails: the disk is full, or has become read-only."""
    sync = os.fsync

    def counting(descriptor):
        count[0] += 1
        if count[0] > after:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr("vitkit.files.os.fsync", counting)


@pytest.mark.parametrize(
    ("number", "way"),
    [
        (errno.ENOSPC, "No space left on device; free some room, or choose another --out"),
        (errno.EROFS, "Read-only file system; choose a directory that can be written to"),
    ],
)
def test_wherever_the_disk_gives_out_the_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, number, way):
    whole = train(tmp_path / "whole")
    count = [0]
    with monkeypatch.context() as patch:
        refuse_sync(patch, number, after=10**6, count=count)
        train(tmp_path / "counted")
    assert count[0] > 15  # a sync of each file, and of its directory
    for after in range(1, count[0] - 1, 3):  # what fails last is a sync of the directory alone, which some systems refuse
        out = tmp_path / str(after)
        with monkeypatch.context() as patch:
            refuse_sync(patch, number, after=after, count=[0])
            with pytest.raises(RunError, match=f"cannot write {out}.*: {way}"):
                train(out)
        assert not list(out.rglob("*.partial"))
        json.loads((out / "summary.json").read_text())
        if (out / LAST).exists():
            load_state(out / LAST)
        resumed = train(out, resume=True)
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match=f"cannot write to {tmp_path / 'run'}: Permission denied; choose another --out"):
        Run(tmp_path / "run", device="cpu")


def test_a_damaged_checkpoint_is_never_gone_on_from(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", epochs=2)
    path = tmp_path / "run" / LAST
    good = path.read_bytes()
    for damaged in (good[:-1], good[:200], b"", good[:-5] + bytes([good[-5] ^ 4]) + good[-4:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"last.safetensors is cut short.*damaged.*; delete it"):
            train(tmp_path / "run", resume=True)
        assert path.read_bytes() == damaged  # nothing is thrown away unasked
    path.unlink()
    resumed = train(tmp_path / "run", resume=True)
    assert "no checkpoint yet: starting from the beginning" in (tmp_path / "run" / "log.txt").read_text()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", epochs=2)
    future = time.time() + 10**6
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (future, future))
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    resumed = train(tmp_path / "run", resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0


def test_runs_that_start_in_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitkit.runs.directory.time.strftime", lambda *_: "20260102-030405")
    runs = [Run(device="cpu", name="made") for _ in range(3)]
    assert [run.directory.name for run in runs] == ["20260102-030405", "20260102-030405-2", "20260102-030405-3"]
    for run in runs:
        run.close()


def test_a_directory_belongs_to_one_process_until_it_ends_even_by_a_kill(tmp_path):
    out = tmp_path / "run"
    program = f"from vitkit import Run; run = Run({str(out)!r}, device='cpu'); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunDirectoryError, match="is in use by another process; wait until it ends, or choose"):
                Run(out, device="cpu", **options)
        other.kill()
        other.wait()
    Run(out, device="cpu").close()
