"""Memory and time of a run on many devices, for `--dry-run --devices N`: calculated from one step on a few images.

Assumptions: memory grows linearly with the images of a device, plus a part that does not depend on them; the
global batch is divided evenly; FLOPs are those of matrix products and convolutions; nothing waits for the network.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from vitkit.console import duration
from vitkit.training.batches import map_batch, samples_of, tensors_of

PEAK_FLOPS = 989e12
"""FLOP/s of one device: an H100 SXM in bf16, dense, from its data sheet."""
UTILISATION = 0.4
"""The share of the peak that well-tuned training of transformers with a few hundred million parameters reaches."""
MEASURED_SAMPLES = 8
"""Samples of the measured step: enough to separate the fixed part of the memory, and few enough for a laptop."""


@dataclass(frozen=True)
class Needs:
    """Bytes and FLOPs of a training step; activations are `fixed_bytes + image_bytes · images`, FLOPs are an image's."""

    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    layer_bytes: int  # the weights of the largest layer of a stack: full sharding gathers one at a time
    image_bytes: float
    fixed_bytes: float
    forward_flops: float
    backward_flops: float

    @property
    def state_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes

    def activation_bytes(self, images: int) -> float:
        return self.fixed_bytes + self.image_bytes * images

    def replicated_bytes(self, images: int, devices: int) -> float:
        """A device's memory if each holds the full model (DDP), with the buckets in which gradients are summed."""
        buckets = self.gradient_bytes if devices > 1 else 0
        return self.state_bytes + buckets + self.activation_bytes(images)

    def sharded_bytes(self, images: int, devices: int) -> float:
        """A device's memory if each holds its part of everything and two full layers: one in use, one being gathered."""
        gathered = 2 * self.layer_bytes if devices > 1 else 0
        return self.state_bytes / devices + gathered + self.activation_bytes(images)

    def seconds(self, images: int, devices: int) -> float:
        """Seconds for `images` images, forward and backward, on all devices at `UTILISATION` of `PEAK_FLOPS`."""
        return images * (self.forward_flops + self.backward_flops) / (devices * PEAK_FLOPS * UTILISATION)


def measure(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: Optimizer,
    *,
    ema: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Needs:
    """Take one training step on at most eight samples of `batch`, and measure the tensors that it keeps; the weights change.

    Activations are what autograd saves for the backward pass, each storage once, without the weights and the batch itself. A
    second forward pass on half of the samples separates the part that grows with their number. Gradients and the optimiser's state are
    measured after the step; averaged weights are a copy of weights and buffers.
    """
    samples = min(MEASURED_SAMPLES, samples_of(batch))
    few = map_batch(batch, lambda value: value[:samples].clone())  # nothing else of the batch is kept
    model.train()
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with _saved(model, few) as saved, forward, autocast():
        loss = model(few)["loss"]
    most = saved.bytes
    with backward:
        loss.backward()
    weights = sum(map(_bytes, (*model.parameters(), *model.buffers())))
    gradients = sum(_bytes(parameter.grad) for parameter in model.parameters() if parameter.grad is not None)
    optimizer.step()
    image, fixed = most / samples, 0.0
    if samples >= 4:
        half = map_batch(few, lambda value: value[: samples // 2])
        with _saved(model, half) as saved, autocast():
            model(half)
        image = (most - saved.bytes) / (samples - samples // 2)
        fixed = most - image * samples
    return Needs(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=_held(optimizer.state_dict()),
        ema_bytes=weights if ema else 0,
        layer_bytes=max((sum(map(_bytes, layer.parameters())) for layer in _layers(model)), default=weights),
        image_bytes=image,
        fixed_bytes=fixed,
        forward_flops=forward.get_total_flops() / samples,
        backward_flops=backward.get_total_flops() / samples,
    )


def rows(needs: Needs, *, devices: int, batch_size: int, steps: int, epochs: int) -> dict[str, str]:
    """The table of a run of `epochs` of `steps` steps of `batch_size` samples, divided among `devices`."""
    each = -(-batch_size // devices)
    count = max(needs.parameters, 1)
    kinds = {
        "weights": needs.weight_bytes, "gradients": needs.gradient_bytes, "optimiser": needs.optimizer_bytes,
        "averaged weights": needs.ema_bytes,
    }  # fmt: skip
    epoch = needs.seconds(batch_size * steps, devices)
    flops = needs.forward_flops + needs.backward_flops
    return {
        "a parameter": f"{needs.state_bytes / count:.1f} bytes: "
        + ", ".join(f"{name} {held / count:.1f}" for name, held in kinds.items()),
        "the model's state": f"{_size(needs.state_bytes)} for {needs.parameters:,} parameters",
        "activations": f"{_size(needs.image_bytes)} a sample, and {_size(needs.fixed_bytes)} for any number of samples",
        "batch": f"{batch_size} samples, {each} on each of {devices} devices",
        "a device, DDP": _size(needs.replicated_bytes(each, devices)),
        "a device, fully sharded": _size(needs.sharded_bytes(each, devices)),
        "traffic a step, DDP": f"{_size(2 * (devices - 1) / devices * needs.gradient_bytes)} in and out of each device",
        "FLOPs a sample": f"{needs.forward_flops:,.0f} forward, {needs.backward_flops:,.0f} backward",
        "FLOPs an epoch": f"{flops * batch_size * steps:.3g}",
        "an epoch": f"{duration(epoch)}, {epoch * devices / 3600:.3g} device-hours",
        "all epochs": f"{duration(epoch * epochs)}, {epoch * epochs * devices / 3600:.3g} device-hours",
        "assumed": f"{UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s a device (H100 SXM, bf16, dense), no waiting for data, "
        f"network or evaluations; activations as this machine's device keeps them; under full sharding two layers gathered",
    }


class _Saved:
    """Bytes of the storages that autograd saves, each once."""

    def __init__(self, excluded: set[int]) -> None:
        self.bytes, self._seen = 0, excluded

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:  # no storage is freed before the backward pass, so an address names one storage
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def _saved(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[_Saved]:
    excluded = (*model.parameters(), *model.buffers(), *tensors_of(batch))
    saved = _Saved({tensor.untyped_storage().data_ptr() for tensor in excluded})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for stack in model.modules():
        if isinstance(stack, nn.Sequential | nn.ModuleList):
            yield from (layer for layer in stack if not isinstance(layer, nn.Sequential | nn.ModuleList))


def _held(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return _bytes(state)
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_held, inner))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(count: float) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_:
            return f"{count / bytes_:,.1f} {unit}"
    return f"{count:,.0f} bytes"


__all__ = ["PEAK_FLOPS", "UTILISATION", "Needs", "measure", "rows"]
