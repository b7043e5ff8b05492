"""Collectives against one process that holds everything."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from vitkit.distributed.collectives import (
    AnyRank,
    BatchNorm,
    all_gather,
    all_reduce_mean,
    all_reduce_sum,
    broadcast,
    broadcast_text,
    draw_rows,
    rank,
    world_size,
)

PARTS = (5, 3)
"""How many of eight samples each of two ranks holds."""


def test_without_a_process_group_everything_is_identity() -> None:
    x = torch.randn(3, 2)
    assert (rank(), world_size()) == (0, 1)
    assert AnyRank()(True, False) == [True, False]
    for collective in (all_reduce_sum, all_reduce_mean, all_gather, broadcast):
        assert torch.equal(collective(x), x)


def variance(x: Tensor) -> Tensor:
    """Σ (x − mean)² over all samples, divided by their number: not a mean of the ranks' own."""
    n = all_reduce_sum(torch.tensor(float(len(x))))
    mean = all_reduce_sum(x.sum(0)) / n
    return all_reduce_sum((x - mean).square().sum()) / n


def similarity(x: Tensor) -> Tensor:
    """Every sample of this rank against every sample of all: what a contrastive loss does."""
    everyone = all_gather(x)
    return all_reduce_sum(torch.logsumexp(x @ everyone.T, dim=1).sum()) / len(everyone)


def scaled(x: Tensor) -> Tensor:
    return all_reduce_mean(x.square().sum())


def normalised(x: Tensor) -> Tensor:
    norm = BatchNorm(x.shape[1])
    loss = all_reduce_sum(norm(x).pow(3).sum())
    return loss + (norm.running_mean - norm.running_var).square().sum()  # equal on all ranks


EXPECTED: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "variance": (variance, 1.0), "similarity": (similarity, 1.0), "scaled": (scaled, 0.5),
    "normalised": (normalised, 1.0),
}  # fmt: skip


def raised(agree: AnyRank) -> Tensor:
    """The answers of four steps: rank 0 raises the first flag in step 0, rank 1 in step 1; rank 1 the second flag in step 2."""
    return torch.tensor([agree(rank() == step, step == 2 and rank() == 1) for step in range(4)])


def _worker(number: int, folder: str, x: Tensor, weight: Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2
    )
    results = {}
    part = x.split(PARTS)[number]
    for name, (loss, _) in EXPECTED.items():
        w = weight.clone().requires_grad_()
        value = loss(part @ w)
        (gradient,) = torch.autograd.grad(value, w)
        results[name] = (value.detach(), gradient)
    results["gathered"] = all_gather(part)
    results["drawn"] = broadcast(torch.full((2,), float(number + 7)))
    results["told"] = broadcast_text(f"from rank {number}, é")
    results["rows"] = draw_rows(lambda n: torch.arange(float(n)) + 10 * number, part)
    results["raised"] = raised(AnyRank())
    with mock.patch("torch.distributed.get_backend", return_value="nccl"):  # then the flags have a group of their own
        results["raised apart"] = raised(AnyRank())
    results["place"] = torch.tensor([rank(), world_size()])
    torch.save(results, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor, list[dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 4, generator=generator), torch.randn(4, 3, generator=generator)
    mp.spawn(_worker, (str(folder), x, weight), nprocs=2)
    return x, weight, [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("name", EXPECTED)
def test_two_ranks_give_the_loss_and_gradient_of_one(
    name: str, two_ranks: tuple[Tensor, Tensor, list[dict]]
) -> None:
    x, weight, results = two_ranks
    loss, factor = EXPECTED[name]
    w = weight.clone().requires_grad_()
    value = loss(x @ w) * factor
    (gradient,) = torch.autograd.grad(value, w)
    averaged = (results[0][name][1] + results[1][name][1]) / 2  # as DDP averages
    for result in results:
        torch.testing.assert_close(result[name][0], value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(averaged, gradient, rtol=1e-5, atol=1e-5)


def test_gathering_keeps_order_and_uneven_parts(two_ranks: tuple[Tensor, Tensor, list[dict]]) -> None:
    x, _, results = two_ranks
    for number, result in enumerate(results):
        assert torch.equal(result["gathered"], x)
        assert result["drawn"].tolist() == [7.0, 7.0]
        assert result["told"] == "from rank 0, é"
        assert result["rows"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7]][number]
        # answers come a step later
        for name in ("raised", "raised apart"):
            assert result[name].int().tolist() == [[0, 0], [1, 0], [1, 0], [0, 1]]
        assert result["place"].tolist() == [number, 2]
