"""What `--dry-run` shows: every resolved value, and what the model is and costs, without training it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from vitkit.training import memory_estimate

if TYPE_CHECKING:
    from vitkit.training.run import Run


def preview(
    run: "Run", model: nn.Module, batches: Any, *, epochs: int, optimizer: Optimizer, ema: bool, devices: int | None
) -> Group:
    """Tables of arguments, settings and the model: parameters, tokens a view, FLOPs a sample (forward pass).

    With `devices` a table of what a run on so many needs, too, see `vitkit.training.memory_estimate`.
    """
    batch = next(iter(batches.epoch(0, seed=run.seed) if hasattr(batches, "epoch") else batches))
    samples = len(next(iter(batch.values())))
    measured = min(samples, memory_estimate.MEASURED_ON)  # a large batch may not fit into the machine that plans for larger ones
    few = {name: value[:measured].to(run.device) for name, value in batch.items()}
    model = model.to(run.device)
    counter = FlopCounterMode(display=False)
    with _tokens(model) as tokens, torch.no_grad(), counter, run.accelerator.autocast():
        model(few)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = {
        "batch": ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items()),
        "parameters": f"{parameters:,} ({trained:,} trained)",
        "tokens": ", ".join(f"{count} × {views * samples // measured} sequences" for count, views in tokens.items()) or "unknown",
        "FLOPs a sample": f"{counter.get_total_flops() / measured:,.0f} (forward; a training step is about three times that)",
        "steps": f"{epochs} epochs × {run.steps(batches)} steps",
    }
    tables = [
        _table("arguments", run.arguments), _table("settings", run.settings() | {"out": str(run.directory)}),
        _table("model", rows),
    ]  # fmt: skip
    if devices is not None:
        needs = memory_estimate.measure(model, few, optimizer, ema=ema, autocast=run.accelerator.autocast)
        planned = memory_estimate.rows(needs, devices=devices, batch_size=samples, steps=len(batches), epochs=epochs)
        tables.append(_table(f"on {devices} device{'s' if devices > 1 else ''}", planned))
    return Group(*tables)


@contextmanager
def _tokens(model: nn.Module) -> Iterator[dict[int, int]]:
    """Sequence lengths that backbones computed with during the block, and how many sequences had each; it is filled at its end.

    A backbone's layers are looked at, not its output alone, which may be fewer tokens than went in: those of the layer with most.
    """
    backbones = [m for m in model.modules() if hasattr(m, "embed_dim") and hasattr(m, "spec")]
    inner = {part for backbone in backbones for part in backbone.modules() if part is not backbone}
    seen: list[dict[nn.Module, Counter[int]]] = []
    handles = []
    for backbone in backbones:
        if backbone not in inner:
            layers: dict[nn.Module, Counter[int]] = {}
            look = partial(_look, layers, cast(int, backbone.embed_dim))
            handles += [layer.register_forward_hook(look) for layer in backbone.modules()]
            seen.append(layers)
    found: dict[int, int] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for layers in seen:
            most = max(layers.values(), key=lambda counts: sum(n * sequences for n, sequences in counts.items()), default=Counter())
            for length, sequences in most.items():
                found[length] = found.get(length, 0) + sequences


def _look(layers: dict[nn.Module, Counter[int]], width: int, layer: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.ndim == 3 and output.shape[2] == width:
        layers.setdefault(layer, Counter())[output.shape[1]] += output.shape[0]


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table
