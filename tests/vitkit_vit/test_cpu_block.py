"""The CPU's block against the modules whose function it computes."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitkit_vit import cpu_block
from vitkit_vit.layers import Block


def make(dim: int = 16, num_heads: int = 2, dropout: float = 0.0, attn_dropout: float = 0.0) -> Block:
    torch.manual_seed(0)
    block = Block(dim, num_heads, mlp_ratio=2.0, dropout=dropout, attn_dropout=attn_dropout, drop_path=0.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def by_modules(block: Block, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(cpu_block, "suits", lambda x: False)
        return block(x)


def gradients(output: Tensor, block: Block, x: Tensor) -> list[Tensor]:
    g = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    return list(torch.autograd.grad((output * g).sum(), [x, *block.parameters()]))


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_it_computes_what_the_modules_compute_in_any_number_of_chunks(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_block, "CHUNK", 2 * 5 * 16)
    block = make().double()
    x = torch.randn(samples, 5, 16, dtype=torch.double, requires_grad=True)
    ours, theirs = block(x), by_modules(block, x, monkeypatch)
    torch.testing.assert_close(ours, theirs)
    for first, second in zip(gradients(ours, block, x), gradients(theirs, block, x), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_gradients_are_those_of_finite_differences(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_block, "CHUNK", 2 * 3 * 4)
    block = make(4, 2, dropout=rate, attn_dropout=rate).double()
    x = torch.randn(3, 3, 4, dtype=torch.double, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(2)  # the same masks each time
        return block(x)

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


def test_dropout_leaves_the_mean_of_a_linear_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the MLP's biases positive enough for GELU to be linear, dropout may not move the mean."""
    block = make(8, 2, dropout=0.3, attn_dropout=0.2).double()
    with torch.no_grad():
        block.mlp.fc1.bias.fill_(50.0)
        block.attn.proj.weight.mul_(1e-3)  # keeps what the second norm sees linear in attention's noise
    x = torch.randn(1, 4, 8, dtype=torch.double)
    draws = torch.cat([block(x.expand(500, -1, -1)) for _ in range(20)]).detach()
    block.eval()
    error = (draws.mean(dim=0) - block(x)[0]).abs() / (draws.std(dim=0) / len(draws) ** 0.5)
    assert error.max() < 5
    assert draws.std(dim=0).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masks_drop_the_share_they_are_told(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.full((1000, 101), -1.5, dtype=dtype)
    dropped = cpu_block._drop(x, cpu_block._mask(x, 0.25))
    assert ((dropped == -1.5) | (dropped == 0)).all()
    share = (dropped == 0).double().mean(dim=0)
    assert share.mean().item() == pytest.approx(0.25, abs=0.005)
    assert share.std().item() == pytest.approx((0.25 * 0.75 / 1000) ** 0.5, rel=0.3)  # independent draws
    assert cpu_block._mask(x, 0.0) is None
    assert cpu_block._drop(x, None) is x


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_bf16_differs_from_fp32_by_its_rounding_alone(rate: float) -> None:
    torch.manual_seed(0)
    block = Block(64, 4, mlp_ratio=4.0, dropout=rate, attn_dropout=rate, drop_path=0.0)
    x = torch.randn(4, 33, 64, requires_grad=True)
    torch.manual_seed(3)
    exact = block(x)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block(x)
    assert rounded.dtype == torch.bfloat16
    for first, second in zip(
        [rounded.float(), *gradients(rounded, block, x)], [exact, *gradients(exact, block, x)], strict=True
    ):
        assert first.dtype == torch.float32
        assert (first - second).norm() < 0.02 * second.norm() + 1e-3


def test_the_private_product_is_the_public_one() -> None:
    torch.manual_seed(0)
    x, weight, bias, residual = (torch.randn(*shape).bfloat16() for shape in ((7, 6), (5, 6), (5,), (7, 5)))
    exact = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(cpu_block._linear(x, weight, bias).double(), exact, atol=0.05, rtol=0.01)
    with_residual = cpu_block._linear(x, weight, bias, residual).double()
    torch.testing.assert_close(with_residual, exact + residual.double(), atol=0.05, rtol=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_its_flops_are_counted(bf16: bool) -> None:
    block = make()
    counter = FlopCounterMode(display=False)
    with counter, torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
        block(torch.randn(2, 3, 16))
    rows, products, attention = 2 * 3, 4 * 16 * 16 + 2 * 16 * 32, 2 * 3 * 16
    assert counter.get_total_flops() == 2 * rows * (products + attention)


def test_a_second_derivative_is_refused_in_words() -> None:
    block = make()
    x = torch.randn(1, 3, 16, requires_grad=True)
    (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    block = make()
    x = torch.randn(2, 3, 16, requires_grad=True)
    outside = gradients(block(x), block, x)
    output = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(output, block, x)
    for first, second in zip(inside, outside, strict=True):
        assert torch.equal(first, second)


def test_it_leaves_long_sequences_other_devices_and_stochastic_depth_to_the_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cpu_block.suits(torch.zeros(1, 65, 4))
    assert not cpu_block.suits(torch.zeros(1, cpu_block.LONGEST + 1, 4))
    assert not cpu_block.suits(torch.zeros(1, 65, 4, device="meta"))
    block = make()
    block.drop_path = 0.5
    used = []
    monkeypatch.setattr(cpu_block, "block", lambda x, *rest: used.append(1) or x)
    block(torch.randn(2, 3, 16))
    assert not used
    block.eval()(torch.randn(2, 3, 16))
    assert used


def test_torch_compile_goes_around_it() -> None:
    block = make()
    x = torch.randn(2, 3, 16, requires_grad=True)
    compiled = torch.compile(block, backend="eager")
    for first, second in zip(gradients(compiled(x), block, x), gradients(block(x), block, x), strict=True):
        torch.testing.assert_close(first, second)
