"""Two gloo processes by DDP and by FSDP2 against one that has the whole batch: losses, weights, averages, checkpoints."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import vitkit
from vitkit import Run, heads
from vitkit.distributed.collectives import BatchNorm, all_gather, all_reduce_sum
from vitkit.errors import RunError, UsageError
from vitkit.runs.directory import LAST
from vitkit.training import GradCacheable
from vitkit.training.checkpoint import load_state
from vitkit.training.optim import adamw, muon_adamw, warmup_cosine

EPOCHS = 2


class Points:
    """Two whole batches of eight and one of five: the ranks have four and four, and three and two."""

    def __len__(self) -> int:
        return 3

    def epoch(self, number: int, *, seed=0, start=0, device="cpu", rank=0, world=1):
        for index in range(start, 3):
            x = torch.randn(8 if index < 2 else 5, 6, generator=torch.Generator().manual_seed(100 * number + index))
            x = x.tensor_split(world)[rank]
            yield {"images": x, "labels": x.sum(1)}


class Spread(GradCacheable):
    """A loss that is no mean over samples, of a head behind a batch norm, a buffer that counts, and a weight that is fixed."""

    autocast = False  # of the last call in this process: what computes may be a copy

    def __init__(self) -> None:
        super().__init__()
        self.head = heads.build("mlp", in_dim=6, out_dim=3, hidden=10)
        self.norm = BatchNorm(6)
        self.fixed = nn.Linear(3, 1).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        Spread.autocast = torch.is_autocast_enabled("cpu")
        return dict(batch)

    def compute_loss(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.training:
            self.calls += 1
        z = self.head(self.norm(embedded["images"]))
        count = all_reduce_sum(torch.tensor(float(len(z))))
        fit = all_reduce_sum((self.fixed(z)[:, 0] - embedded["labels"]).square().sum()) / count
        every = all_gather(z)
        return {"loss": fit + (every.std(dim=0) - 1).square().sum(), "fit": fit}


def train(out: Path, *, optimizer: str, grad_accum: int, resume: bool = False, epochs: int = EPOCHS, precision: str = "fp32") -> None:
    """A run that leaves its losses, what it looked like to an evaluator, and its weights in `out`."""
    run = Run(out, device="cpu", precision=precision, grad_accum=grad_accum, resume=resume)
    torch.manual_seed(0)
    model = Spread()
    made = muon_adamw(model, lr=1e-3) if optimizer == "muon" else adamw(model, lr=1e-2)
    schedule = warmup_cosine(made, EPOCHS * -(-3 // grad_accum), warmup=1)
    seen: list[float] = []
    fit = run.fit(model, Points(), epochs=epochs, optimizer=made, schedule=schedule, clip=0.5, ema=0.8)
    for epoch in fit:
        assert not any(hasattr(value, "full_tensor") for value in model.state_dict().values())
        with torch.no_grad():  # what an evaluator does: a method of a part of the model
            seen.append(float(model.eval().head(torch.ones(2, 6)).sum()))
        model.train()
        epoch.log(seen=seen[-1], loss_again=epoch.losses["loss"])
    run.save(head=model.head)
    if run.is_main:  # the report is left out: drawing it takes longer than the run
        kept = {"seen": seen, "weights": model.state_dict(), "settings": run.session.settings(), "autocast": Spread.autocast}
        torch.save(kept, out / "found.pt")
    run.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def set_as_launched(rank: int, port: int) -> None:
    """What torchrun and `accelerate launch` set."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _worker(rank: int, port: int, parallel: str, jobs: list[tuple[Path, dict[str, Any]]]) -> None:
    """Runs one after another."""
    set_as_launched(rank, port)
    if parallel == "fsdp":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for out, options in jobs:
        train(out, **options)
    torch.distributed.destroy_process_group()


KINDS = [("adamw", 1), ("adamw", 2), ("muon", 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`PARALLEL-OPTIMIZER-ACCUMULATION`, `PARALLEL-resumed`, and `one-...` of a single process."""
    folder = tmp_path_factory.mktemp("runs")
    for parallel in ("ddp", "fsdp"):
        jobs: list[tuple[Path, dict[str, Any]]] = [
            (folder / f"{parallel}-{optimizer}-{accum}", {"optimizer": optimizer, "grad_accum": accum}) for optimizer, accum in KINDS
        ]
        half = {"optimizer": "muon", "grad_accum": 1}
        jobs += [(folder / f"{parallel}-resumed", {**half, "epochs": 1}), (folder / f"{parallel}-resumed", {**half, "resume": True})]
        if parallel == "fsdp":
            jobs.append((folder / "fsdp-bf16", {"optimizer": "adamw", "grad_accum": 1, "precision": "bf16", "epochs": 1}))
        mp.spawn(_worker, (free_port(), parallel, jobs), nprocs=2)
    for optimizer, accum in KINDS:
        train(folder / f"one-{optimizer}-{accum}", optimizer=optimizer, grad_accum=accum)
    return folder


def found(path: Path) -> dict[str, Any]:
    return torch.load(path / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("optimizer", "accum"), KINDS)
def test_two_processes_end_as_one(runs: Path, parallel: str, optimizer: str, accum: int) -> None:
    expected, got = found(runs / f"one-{optimizer}-{accum}"), found(runs / f"{parallel}-{optimizer}-{accum}")
    assert (got["settings"]["processes"], got["settings"]["parallel"]) == (2, parallel)
    # Muon orthogonalises in bf16, where a rounding that falls the other way is a hundred times larger than in fp32.
    close = {"rtol": 1e-5, "atol": 1e-5} if optimizer == "adamw" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(got["weights"], expected["weights"], **close)
    torch.testing.assert_close(got["seen"], expected["seen"], **close)
    losses = [
        [row["loss"] for row in load_state(runs / f"{name}-{optimizer}-{accum}" / LAST).progress["run"]["losses"]]
        for name in ("one", parallel)
    ]
    torch.testing.assert_close(*losses, **close)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_resumed_run_is_an_undisturbed_one_bit_for_bit(runs: Path, parallel: str) -> None:
    whole, resumed = runs / f"{parallel}-muon-1", runs / f"{parallel}-resumed"
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert found(whole)["seen"] == found(resumed)["seen"]


@pytest.mark.slow
def test_sharded_checkpoints_and_models_are_whole(runs: Path, tmp_path: Path) -> None:
    """One process goes on from what two have sharded, and anybody opens the saved model."""
    one, two = (load_state(runs / f"{name}-adamw-1" / LAST) for name in ("one", "fsdp"))
    torch.testing.assert_close(two.model_state, one.model_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two.optimizer, one.optimizer, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two.ema_state, one.ema_state, rtol=1e-5, atol=1e-5)
    loaded = vitkit.load(runs / "fsdp-adamw-1")
    torch.testing.assert_close(loaded.head.state_dict(), {
        name.removeprefix("head."): value for name, value in found(runs / "one-adamw-1")["weights"].items() if name.startswith("head.")
    }, rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.slow
def test_sharded_weights_compute_in_the_runs_precision(runs: Path) -> None:
    """As autocast does it: weights and averages stay fp32."""
    expected, got = found(runs / "fsdp-adamw-1"), found(runs / "fsdp-bf16")
    assert (expected["autocast"], got["autocast"]) == (False, True)
    assert {value.dtype for value in got["weights"].values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(got["seen"][0], expected["seen"][0], rtol=0.1, atol=0.05)


def _on_machines_apart(rank: int, port: int, folder: str) -> None:
    set_as_launched(rank, port)
    (Path(folder) / str(rank)).mkdir()
    os.chdir(Path(folder) / str(rank))
    train(Path("run"), optimizer="adamw", grad_accum=1, epochs=1)
    with pytest.raises(RunError, match=r"last.safetensors is seen by 1 of 2 ranks; .*put --out on a file system that all of them share"):
        train(Path("run"), optimizer="adamw", grad_accum=1, resume=True)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_checkpoint_that_one_machine_alone_sees_is_not_gone_on_from(tmp_path: Path) -> None:
    """The others would begin again, and train another model together with it."""
    mp.spawn(_on_machines_apart, (free_port(), str(tmp_path)), nprocs=2)


def test_fsdp_of_the_first_version_is_refused(monkeypatch: Any) -> None:
    from types import SimpleNamespace

    from vitkit.training.accelerator import _shard

    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(UsageError, match="launch with --fsdp_version 2"):
        _shard(accelerator)
