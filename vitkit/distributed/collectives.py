"""Collectives with gradients. With one process they do nothing.

One convention gives the gradient of the batch of all ranks. Every rank computes the same loss from reduced (or gathered) values, and calls
backward on it. The backward pass of a reduction is the sum over ranks of the incoming gradients, W times the true gradient; DDP's mean
over W ranks then gives, for θ on each rank,

    (1/W) Σ_r ∂L_r/∂θ = Σ_r ∂L/∂s · ∂s_r/∂θ,

the gradient that one process with all samples computes. A mean over all samples must be a reduced sum over a reduced count: with parts of
different sizes the mean of the ranks' means is another number. With plain `torch.distributed.all_reduce` in the forward pass the gradient
is silently W times too small.

torch's own versions with gradients, `torch.distributed.nn.functional`, are deprecated and take parts of equal sizes only; their successors,
`_functional_collectives`, are private.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """The number of this process in [0, world_size()); 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Σ_r x_r over ranks, on every rank; any shape, equal on all ranks. Backward: the sum of the ranks' gradients."""
    return x if world_size() == 1 else _Sum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """(1/W) Σ_r x_r over W ranks; for parts of different sizes this is not the mean over all samples (see the module)."""
    return all_reduce_sum(x) / world_size()


def all_gather(x: Tensor) -> Tensor:
    """The ranks' `(n_r ...)` one after another, `(Σ n_r ...)`; n_r may differ, other dimensions may not.

    Backward: the sum over ranks of the gradients of this rank's own rows.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's `x` on every rank, written into `x`; no gradient flows."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def broadcast_text(text: str, *, device: torch.device | str = "cpu") -> str:
    """Rank 0's `text` on every rank; `device` is a device that the process group communicates on."""
    if world_size() == 1:
        return text
    body = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = broadcast(torch.tensor(len(body), device=device))
    received = body if rank() == 0 else torch.zeros(int(length), dtype=torch.uint8, device=device)
    return bytes(broadcast(received).tolist()).decode()


class AnyRank:
    """For each flag: True if any rank has raised it. The answer is the same on every rank and arrives one call late.

    All ranks create it, and call it equally often. A call answers for the flags of the previous call, so that it rarely waits for
    other ranks; with one process it answers for its own flags. The flags travel between processors, through gloo, also if the ranks
    train on GPUs: reading an answer on a GPU would wait for the whole step.
    """

    def __init__(self) -> None:
        across = world_size() > 1 and dist.get_backend() != "gloo"
        self._group: Any = dist.new_group(backend="gloo") if across else None
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        if world_size() == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        before, self._pending = self._pending, (dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group, async_op=True), raised)
        if before is None:
            return [False] * len(flags)
        work, answers = before
        work.wait()
        return [bool(answer) for answer in answers.tolist()]


def draw_rows(draw: Callable[[int], Tensor], like: Tensor) -> Tensor:
    """This rank's rows of `draw(n)` `(n ...)`, drawn on rank 0 for the n samples of all ranks.

    `like` `(n_r ...)` has this rank's number of samples, and its device. With one process this is `draw(len(like))`.
    """
    if world_size() == 1:
        return draw(len(like))
    sizes = _sizes(like)
    # Every rank draws and only rank 0's numbers are used: each rank's generator advances as with one process.
    drawn = broadcast(draw(sum(sizes)).contiguous())
    return drawn.split(sizes)[rank()]


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of `(n d)` over the rows of all ranks, whose numbers may differ; with one process `nn.BatchNorm1d`.

    In training (x − mean)/√(var + eps)·weight + bias with mean and biased variance over all ranks, in fp32; the running statistics are
    the same on every rank. `nn.SyncBatchNorm` works on CUDA devices only.
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
        # Collectives need equal shapes, so shorter parts are padded and cut afterwards.
        padded = x.new_zeros(max(ctx.sizes), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum(grad).split(ctx.sizes)[rank()]


def _sizes(x: Tensor) -> list[int]:
    """The number of rows of each rank's `x`."""
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
