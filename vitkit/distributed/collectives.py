"""Collectives that gradients flow through, and that do nothing where there is one process.

One convention gives the gradient of the whole batch. Every rank computes the same loss from reduced (or
gathered) values, and calls backward on it. The backward pass of a reduction is the sum over ranks of the
incoming gradients, W times the true one; DDP's averaging over W ranks then gives, for θ on each rank,

    (1/W) Σ_r ∂L_r/∂θ = Σ_r ∂L/∂s · ∂s_r/∂θ,

which is what one process would have found with all samples. A mean over the whole batch must therefore be a
reduced sum over a reduced count: with parts of different sizes the mean of the ranks' means is another
number. With plain `torch.distributed.all_reduce` in the forward pass the result is silently W times too
small.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This process's number in [0, world_size()); 0 where no process group was initialised."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """How many processes take part; 1 where no process group was initialised."""
    return dist.get_world_size() if _initialised() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Σ_r x_r over ranks, the same on each; any shape, equal on all. Backward: the sum of their gradients."""
    return x if world_size() == 1 else _Sum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """(1/W) Σ_r x_r over W ranks; of parts of different sizes not the whole batch's mean (see the module)."""
    return all_reduce_sum(x) / world_size()


def all_gather(x: Tensor) -> Tensor:
    """The ranks' `(n_r ...)` one after another, `(Σ n_r ...)`; n_r may differ, further dimensions may not.

    Backward: the sum over ranks of the gradients of this rank's own rows.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's `x` on every rank, written into `x` itself; no gradient flows."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def broadcast_text(text: str, *, device: torch.device | str = "cpu") -> str:
    """Rank 0's `text` on every rank; `device` is one that the process group communicates on."""
    if world_size() == 1:
        return text
    body = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = broadcast(torch.tensor(len(body), device=device))
    told = body if rank() == 0 else torch.zeros(int(length), dtype=torch.uint8, device=device)
    return bytes(broadcast(told).tolist()).decode()


class AnyRank:
    """Of each flag whether any rank has raised it, the same answer on every rank: one step late, so that no device is waited for.

    Called by all ranks alike, with flags it answers what the call before was given; with one process, what this one is.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        if world_size() == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self._device)
        before, self._pending = self._pending, (dist.all_reduce(raised, op=dist.ReduceOp.MAX, async_op=True), raised)
        if before is None:
            return [False] * len(flags)
        work, answers = before
        work.wait()
        return [bool(answer) for answer in answers.tolist()]


def draw_rows(draw: Callable[[int], Tensor], like: Tensor) -> Tensor:
    """This rank's rows of `draw(n)` `(n ...)`, drawn on rank 0 for the n samples of the whole batch.

    `like` `(n_r ...)` says how many samples this rank has, and on which device. So the whole batch is dealt with as one
    process would deal with it; with one process this is `draw(len(like))`.
    """
    if world_size() == 1:
        return draw(len(like))
    sizes = _sizes(like)
    # Every rank draws, though only rank 0's count, so that their generators stay in step with their own past.
    whole = broadcast(draw(sum(sizes)).contiguous())
    return whole.split(sizes)[rank()]


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of `(n d)` over all ranks' rows, whose numbers may differ; with one process torch's own.

    In training (x − mean)/√(var + eps)·weight + bias with mean and biased variance of the whole batch, in fp32; the
    running statistics are the same on every rank. `nn.SyncBatchNorm` does this on CUDA devices alone.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            count = all_reduce_sum(x.new_tensor(float(len(x))))
            mean = all_reduce_sum(x.sum(dim=0)) / count
            centred = x - mean
            var = all_reduce_sum(centred.square().sum(dim=0)) / count
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)
            normed = centred * (var + self.eps).rsqrt() * self.weight + self.bias
        return normed.to(input.dtype)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum(grad)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.sizes = _sizes(x)
        # Collectives take equal shapes, so shorter parts are padded and cut again.
        padded = x.new_zeros(max(ctx.sizes), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum(grad).split(ctx.sizes)[rank()]


def _sizes(x: Tensor) -> list[int]:
    """How many rows each rank's `x` has."""
    sizes = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(x.shape[0], device=x.device))
    return [int(size) for size in sizes]


def _sum(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


__all__ = [
    "AnyRank",
    "BatchNorm",
    "all_gather",
    "all_reduce_mean",
    "all_reduce_sum",
    "broadcast",
    "broadcast_text",
    "draw_rows",
    "rank",
    "world_size",
]
