"""The benchmarks' own arithmetic."""

import pytest
import torch
from torch import nn

from benchmarks.timing import Products, in_turn, share, times
from vitkit_vit.layers import Block


def step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().sum().backward()


def test_the_ceiling_holds_every_product_of_a_step_in_its_own_shape():
    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(8, 6)
    products = Products.of(lambda: step(model, x))
    # forward one each; backward the weights' gradients of both, and the input's of the second
    assert len(products.calls) == 5
    assert products.flops == 2 * 8 * (6 * 10 + 10 * 3) + 2 * 8 * (6 * 10 + 2 * 10 * 3)
    assert all(tensor.data_ptr() != x.data_ptr() for _, args, _ in products.calls for tensor in args if torch.is_tensor(tensor))
    before = [parameter.grad.clone() for parameter in model.parameters()]
    products()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_it_sees_into_attention_and_leaves_sums_out(bf16: bool):
    block = Block(16, 2, mlp_ratio=2.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0)
    x = torch.randn(2, 3, 16, requires_grad=True)

    def both() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = block(x)
        y.float().sum().backward()

    rows, linear, attention = 2 * 3, 4 * 16 * 16 + 2 * 16 * 32, 2 * 3 * 16
    products = Products.of(both)
    assert products.flops == 3 * 2 * rows * (linear + attention)  # backward twice forward; biases' sums are none
    dtypes = {arg.dtype for _, args, _ in products.calls for arg in args if torch.is_tensor(arg)}
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
    products()


def test_convolutions_count_and_keep_their_layout():
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    products = Products.of(lambda: conv(x))
    ((_, args, _),) = products.calls
    assert args[0].shape == x.shape
    assert args[0].stride() == x.stride()
    assert products.flops == 2 * 2 * 8 * 8 * 4 * 3 * 9


def test_calls_take_turns_and_the_first_does_not_count():
    order, ticks = [], iter(range(100))
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, lambda: float(next(ticks)))
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ratios_are_of_the_same_round():
    seconds = {"vitkit": [1.0, 2.0, 4.0], "peer": [2.0, 6.0, 4.0], "part": [0.1, 0.1, 0.1]}
    assert times(seconds, "peer") == "2.00 (1.00–3.00)"
    assert share(seconds, "part", "vitkit", 1) == "5.0 % (2.5–10.0)"
