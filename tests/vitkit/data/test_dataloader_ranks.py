"""A plain mean over a rank's batch trains as one device does: real processes, DDP, one epoch with a smaller last batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitkit.data.dataset import from_store
from vitkit.data.store import Stored

BATCH = 16
"""Images of a step over all ranks."""


def dataset():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, count in (("train", 5 * BATCH + 4), ("test", 8)):  # 4 are left: a share of two or of one for each rank
        tensors[f"{split}.images"] = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
        tensors[f"{split}.labels"] = torch.arange(count) % 3
    return from_store(Stored("noise", ["a", "b", "c"], tensors), val_size=0)


def trained(rank: int = 0, world: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 3))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = dataset().train.batches(BATCH // world, shuffle=True)
    sizes = []
    for number in range(2):
        for batch in batches.epoch(number, seed=1, rank=rank, world=world):
            optimizer.zero_grad()
            F.cross_entropy(wrapped(batch["images"]), batch["labels"]).backward()
            optimizer.step()
            sizes.append(len(batch["labels"]))
    assert sizes == [*[BATCH // world] * 5, 4 // world] * 2
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    assert len(dataset().train.batches(BATCH // world, shuffle=True)) == 6
    torch.save(trained(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_cross_entropys_mean_on_several_ranks_trains_the_weights_of_one_device(world: int, tmp_path: Path) -> None:
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    expected = trained()
    for rank in range(world):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-5, rtol=0)
