"""The tables of `--dry-run`: every resolved value, and the size and cost of the model, without training it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from vitkit.training import memory_estimate
from vitkit.training.batches import check_batch, map_batch, samples_of
from vitkit.training.session import Session


def preview(
    session: Session, model: nn.Module, batches: Any, *, epochs: int, optimizer: Optimizer, ema: bool, devices: int | None
) -> Group:
    """Tables of the arguments, the settings and the model: parameters, tokens per view, FLOPs per sample (forward pass).

    `devices` adds a table of the memory and time of a run on that many devices, see `vitkit.training.memory_estimate`.
    """
    batch = next(iter(batches.epoch(0, seed=session.seed) if hasattr(batches, "epoch") else batches))
    check_batch(batch)
    samples = samples_of(batch)
    measured = min(samples, memory_estimate.MEASURED_SAMPLES)  # the machine that makes the plan may be too small for the batch
    few = map_batch(batch, lambda value: value[:measured].to(session.device))
    model = model.to(session.device)
    counter = FlopCounterMode(display=False)
    with _tokens(model) as tokens, torch.no_grad(), counter, session.autocast():
        model(few)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = {
        "batch": ", ".join(f"{name} {_shape(value)}" for name, value in batch.items()),
        "parameters": f"{parameters:,} ({trained:,} trained)",
        "tokens": ", ".join(f"{count} × {views * samples // measured} sequences" for count, views in tokens.items()) or "unknown",
        "FLOPs a sample": f"{counter.get_total_flops() / measured:,.0f} (forward; a training step is about three times that)",
        "steps": f"{epochs} epochs × {session.steps(batches)} steps",
    }
    tables = [
        _table("arguments", session.arguments), _table("settings", session.settings() | {"out": str(session.directory)}),
        _table("model", rows),
    ]  # fmt: skip
    if devices is not None:
        needs = memory_estimate.measure(model, few, optimizer, ema=ema, autocast=session.autocast)
        planned = memory_estimate.rows(needs, devices=devices, batch_size=samples, steps=len(batches), epochs=epochs)
        tables.append(_table(f"on {devices} device{'s' if devices > 1 else ''}", planned))
    return Group(*tables)


@contextmanager
def _tokens(model: nn.Module) -> Iterator[dict[int, int]]:
    """The sequence lengths in backbones during the block, with the number of sequences of each length; filled when the block ends.

    For each backbone the layer with the most tokens counts, because the backbone's output may have fewer.
    """
    backbones = [m for m in model.modules() if hasattr(m, "embed_dim") and hasattr(m, "spec")]
    inner = {part for backbone in backbones for part in backbone.modules() if part is not backbone}
    counted: list[dict[nn.Module, Counter[int]]] = []
    handles = []
    for backbone in backbones:
        if backbone not in inner:
            layers: dict[nn.Module, Counter[int]] = {}
            count = partial(_count, layers, cast(int, backbone.embed_dim))
            handles += [layer.register_forward_hook(count) for layer in backbone.modules()]
            counted.append(layers)
    lengths: dict[int, int] = {}
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()
        for layers in counted:
            most = max(layers.values(), key=lambda counts: sum(n * sequences for n, sequences in counts.items()), default=Counter())
            for length, sequences in most.items():
                lengths[length] = lengths.get(length, 0) + sequences


def _count(layers: dict[nn.Module, Counter[int]], width: int, layer: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.ndim == 3 and output.shape[2] == width:
        layers.setdefault(layer, Counter())[output.shape[1]] += output.shape[0]


def _shape(value: Any) -> str:
    return " and ".join(str(tuple(part.shape)) for part in (value if isinstance(value, tuple | list) else [value]))


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


__all__ = ["preview"]
