"""Collectives with gradients, sharded weights (FSDP2), and a watchdog over the other ranks."""

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
from vitkit.distributed.scalars import load_scalars

__all__ = [
    "AnyRank",
    "BatchNorm",
    "all_gather",
    "all_reduce_mean",
    "all_reduce_sum",
    "broadcast",
    "broadcast_text",
    "draw_rows",
    "load_scalars",
    "rank",
    "world_size",
]
