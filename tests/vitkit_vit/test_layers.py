"""The transformer block: both ways to compute attention, reduced precision, dropout."""

import pytest
import torch
from torch import Tensor

from vitkit_vit import products
from vitkit_vit.layers import Block
from vitkit_vit.products import drop, products_are_faster


def make(dim: int = 16, num_heads: int = 2, dropout: float = 0.0, attn_dropout: float = 0.0) -> Block:
    torch.manual_seed(0)
    block = Block(dim, num_heads, mlp_ratio=2.0, dropout=dropout, attn_dropout=attn_dropout, drop_path=0.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def gradients(output: Tensor, block: Block, x: Tensor) -> list[Tensor]:
    g = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    return list(torch.autograd.grad((output * g).sum(), [x, *block.parameters()]))


def test_batched_products_compute_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make().double()
    x = torch.randn(3, 5, 16, dtype=torch.double, requires_grad=True)
    results = []
    for chosen in (True, False):
        monkeypatch.setattr(products, "products_are_faster", lambda q, dropout, chosen=chosen: chosen)
        y = block(x)
        results.append([y, *gradients(y, block, x)])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def test_gradients_with_dropout_are_those_of_finite_differences() -> None:
    block = make(4, 2, dropout=0.25, attn_dropout=0.25).double()
    x = torch.randn(3, 3, 4, dtype=torch.double, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(2)  # the same masks each time
        return block(x)

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


def test_dropout_keeps_the_mean_of_a_linear_block() -> None:
    """With the MLP's biases positive enough for GELU to be linear, dropout may not move the mean."""
    block = make(8, 2, dropout=0.3, attn_dropout=0.2).double()
    with torch.no_grad():
        block.mlp.fc1.bias.fill_(50.0)
        block.attn.proj.weight.mul_(1e-3)  # keeps the input of the second norm linear in attention's noise
    x = torch.randn(1, 4, 8, dtype=torch.double)
    draws = torch.cat([block(x.expand(500, -1, -1)) for _ in range(20)]).detach()
    block.eval()
    error = (draws.mean(dim=0) - block(x)[0]).abs() / (draws.std(dim=0) / len(draws) ** 0.5)
    assert error.max() < 5
    assert draws.std(dim=0).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_drops_its_share_and_scales_the_rest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.full((1000, 101), -1.5, dtype=dtype, requires_grad=True)
    dropped = drop(x, 0.25)
    assert ((dropped == -2.0) | (dropped == 0)).all()
    share = (dropped == 0).double().mean(dim=0)
    assert share.mean().item() == pytest.approx(0.25, abs=0.005)
    assert share.std().item() == pytest.approx((0.25 * 0.75 / 1000) ** 0.5, rel=0.3)  # independent draws
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient != 0, dropped != 0)
    assert torch.equal(drop(x, 0.0), x)
    assert drop(x[:0], 0.25).shape == (0, 101)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_bf16_differs_from_fp32_by_its_rounding_only(rate: float) -> None:
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


def test_a_second_derivative_is_available() -> None:
    block = make().double()
    x = torch.randn(1, 3, 16, dtype=torch.double, requires_grad=True)
    with torch.autocast("cpu", enabled=False):
        (g,) = torch.autograd.grad(block.mlp(block.norm2(x)).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), x)
    assert second.isfinite().all()


def test_products_are_chosen_on_a_cpu_in_reduced_precision_or_with_dropout_up_to_a_length() -> None:
    heads = torch.zeros(1, 2, 65, 4)
    assert products_are_faster(heads.bfloat16(), 0.0)
    assert products_are_faster(heads, 0.1)
    assert not products_are_faster(heads, 0.0)
    assert not products_are_faster(heads.bfloat16().to("meta"), 0.0)
    assert not products_are_faster(torch.zeros(1, 2, products.LONGEST_TOKENS + 1, 4).bfloat16(), 0.0)


def test_torch_compile_gives_the_same_gradients() -> None:
    block = make()
    x = torch.randn(2, 3, 16, requires_grad=True)
    compiled = torch.compile(block, backend="eager")
    for first, second in zip(gradients(compiled(x), block, x), gradients(block(x), block, x), strict=True):
        torch.testing.assert_close(first, second)
