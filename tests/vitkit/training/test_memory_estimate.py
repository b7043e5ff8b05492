"""What a run on many devices needs, against closed forms for networks small enough to count."""

import contextlib

import pytest
import torch
from torch import nn

from vitkit.training import memory_estimate
from vitkit.training.memory_estimate import Needs, measure, rows

IN, HIDDEN, OUT = 6, 10, 3
COUNT = IN * HIDDEN + HIDDEN + HIDDEN * OUT + OUT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(batch["images"]).square().mean()}


def needs(optimizer=torch.optim.AdamW, samples=16, ema=False, **options) -> Needs:
    torch.manual_seed(0)
    model = Net()
    batch = {"images": torch.randn(samples, IN)}
    return measure(
        model, batch, optimizer(model.parameters(), lr=1e-3, **options), ema=ema, autocast=contextlib.nullcontext
    )


def test_memory_and_flops_are_those_counted_by_hand():
    found = needs()
    assert found.parameters == COUNT
    assert found.weight_bytes == found.gradient_bytes == 4 * COUNT
    assert found.optimizer_bytes == 2 * 4 * COUNT + 4 * 4  # two moments, and a step count for each of four tensors
    assert found.ema_bytes == 0
    assert found.layer_bytes == 4 * (IN * HIDDEN + HIDDEN)
    # kept for the backward pass: what the ReLU and what the second layer put out; the images are the batch
    assert found.image_bytes == 4 * (HIDDEN + OUT)
    assert found.fixed_bytes == 0
    assert found.forward_flops == 2 * (IN * HIDDEN + HIDDEN * OUT)
    assert found.backward_flops == 2 * IN * HIDDEN + 2 * 2 * HIDDEN * OUT  # images need no gradient


@pytest.mark.parametrize(("options", "moments"), [({}, 0), ({"momentum": 0.9}, 1)])
def test_the_optimisers_own_state_counts(options, moments):
    assert needs(torch.optim.SGD, **options).optimizer_bytes == moments * 4 * COUNT


def test_averaged_weights_are_a_copy_and_frozen_weights_have_no_gradient():
    assert needs(ema=True).ema_bytes == 4 * COUNT
    model = Net()
    model.layers[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = measure(
        model, {"images": torch.randn(8, IN)}, torch.optim.SGD(trained, lr=0.1), ema=False, autocast=contextlib.nullcontext
    )
    assert found.gradient_bytes == 4 * (HIDDEN * OUT + OUT)
    assert found.weight_bytes == 4 * COUNT


def test_what_does_not_grow_with_the_batch_is_told_from_what_does():
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1000))

        def forward(self, batch):
            return {"loss": super().forward(batch)["loss"] + self.scale.exp().sum()}  # exp keeps its 1,000 outputs

    model = Shared()
    found = measure(
        model, {"images": torch.randn(16, IN)}, torch.optim.SGD(model.parameters(), lr=0.1), ema=False,
        autocast=contextlib.nullcontext,
    )  # fmt: skip
    assert found.fixed_bytes == 4 * 1000
    assert found.image_bytes == 4 * (HIDDEN + OUT)
    assert found.activation_bytes(100) == 4 * 1000 + 100 * 4 * (HIDDEN + OUT)


def test_one_device_needs_all_of_it_and_many_share_what_is_sharded():
    found = needs(ema=True)
    state, image = found.state_bytes, found.image_bytes
    assert found.replicated_bytes(4, 1) == found.sharded_bytes(4, 1) == state + 4 * image
    assert found.replicated_bytes(4, 8) == state + found.gradient_bytes + 4 * image
    assert found.sharded_bytes(4, 8) == state / 8 + 2 * found.layer_bytes + 4 * image


def test_time_is_flops_over_what_the_devices_give():
    found = needs()
    flops = found.forward_flops + found.backward_flops
    assert found.seconds(1000, 4) == pytest.approx(1000 * flops / (4 * 989e12 * 0.4))
    assert found.seconds(1000, 8) == pytest.approx(found.seconds(1000, 4) / 2)


def test_the_table_says_the_batch_of_a_device_and_what_was_assumed():
    found = Needs(
        parameters=10**6, weight_bytes=4 * 10**6, gradient_bytes=4 * 10**6, optimizer_bytes=8 * 10**6, ema_bytes=0,
        layer_bytes=2**20, image_bytes=2**20, fixed_bytes=0, forward_flops=1e12, backward_flops=2e12,
    )  # fmt: skip
    shown = rows(found, devices=8, batch_size=100, steps=50, epochs=3)
    assert shown["a parameter"] == "16.0 bytes: weights 4.0, gradients 4.0, optimiser 8.0, averaged weights 0.0"
    assert shown["batch"] == "100 samples, 13 on each of 8 devices"
    assert shown["FLOPs an epoch"] == "1.5e+16"
    assert shown["an epoch"] == "4.7 s, 0.0105 device-hours"
    assert shown["all epochs"] == "14 s, 0.0316 device-hours"
    assert shown["a device, fully sharded"] == f"{(16e6 / 8 + 2 * 2**20 + 13 * 2**20) / 2**20:.1f} MiB"
    assert "40% of 989 TFLOP/s" in shown["assumed"]


def test_a_real_step_was_taken_on_few_samples(monkeypatch):
    seen = []
    monkeypatch.setattr(Net, "forward", lambda self, batch, own=Net.forward: seen.append(len(batch["images"])) or own(self, batch))
    needs(samples=64)
    assert seen == [memory_estimate.MEASURED_SAMPLES, memory_estimate.MEASURED_SAMPLES // 2]
