"""A transformer block for CPUs with its backward pass written out: `layers.Block`'s function, twice as fast.

What makes the difference, for ViT 192/6/3 at 65 tokens trained in bf16 on a CPU with AMX, beside timm's block with torch's
attention. Beside timm's block with attention as batched products, and where products are slower (AVX512-BF16), little is left
to gain: 80 % of a step is the products themselves, see the README.

- Torch's flash attention spends half of a training step in its backward pass there. Written as batched matrix
  products, attention takes a fifth of a step half as long.
- Autocast keeps the residual stream in fp32 and copies between it and bf16 around each product. Here all between a
  block's input and output has one dtype; only the statistics of layer norms are fp32.
- What is linear is done to weights rather than to activations, of which there are far more. The scale and shift of a
  layer norm become part of the product behind it, and so do 1/√d_k and the 1/(1 − p) of dropout.
- The batch goes through in chunks: large enough for the products, small enough to stay near the cache and for the C
  library to recycle their memory; a larger block comes from the system, to be zeroed, anew in each step.
- Torch draws dropout masks one element after another. Here one draw serves four.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

CHUNK = 4096 * 192  # elements of the residual stream in a chunk; speed is flat from half to twice that
LONGEST = 512  # tokens; beyond, attention weights outgrow all other activations and flash attention pays

_aten = torch.ops.aten
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a float of so many bytes
_STEPS = 2**15  # dropout probabilities are rounded to multiples of 1/_STEPS


class Parameters(NamedTuple):
    """A block's weights `(out in)`, biases, and the scales and shifts of its norms; or their gradients."""

    scale1: Tensor
    shift1: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    scale2: Tensor
    shift2: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class _Factors(NamedTuple):
    """What products are multiplied by: queries by 1/√d_k, what went through dropout by 1/(1 − p)."""

    queries: float
    mixed: float
    active: float


class _Folded(NamedTuple):
    """Weights in the compute dtype with norms and factors folded in; or gradients, qkv and fc1 as `(in out)`."""

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class _Saved(NamedTuple):
    """What the backward pass needs of one chunk; r stands for rows, samples times tokens."""

    x: Tensor  # (r d)
    mean1: Tensor
    rstd1: Tensor
    normed1: Tensor  # (r d)
    qkv: Tensor  # (3, b·heads, n, d/heads)
    weights: Tensor  # (b·heads, n, n)
    dropped: Tensor  # the same after dropout
    mixed: Tensor  # (r d)
    y: Tensor  # (r d), the residual stream between attention and MLP
    mean2: Tensor
    rstd2: Tensor
    normed2: Tensor  # (r d)
    hidden: Tensor  # (r u), before GELU
    active: Tensor  # (r u), after GELU and dropout
    weights_mask: Tensor | None
    active_mask: Tensor | None
    branch_mask: Tensor | None


def suits(x: Tensor) -> bool:
    """Whether `block` is the way to go for tokens `(b n d)`: not for export, which takes torch's own operations alone."""
    return x.device.type == "cpu" and x.shape[1] <= LONGEST and not torch.compiler.is_exporting()


@torch.compiler.disable  # what torch.compile makes of it is no faster, after minutes
def block(x: Tensor, parameters: Parameters, num_heads: int, eps: float, dropout: float, attn_dropout: float) -> Tensor:
    """Tokens `(b n d)` → `(b n d)` in autocast's dtype, or without autocast in the parameters'.

    It can be differentiated once, not twice.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else parameters.qkv.dtype
    return _Block.apply(x.to(dtype), num_heads, eps, _rate(dropout), _rate(attn_dropout), *parameters)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_heads: int, eps: float, dropout: float, attn_dropout: float, *given: Tensor
    ) -> Tensor:
        parameters = Parameters(*given)
        factors = _Factors((x.shape[-1] // num_heads) ** -0.5, 1 / (1 - attn_dropout), 1 / (1 - dropout))
        size = max(1, CHUNK // (x.shape[1] * x.shape[2]))  # samples in a chunk
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        with torch.autocast("cpu", enabled=False):
            folded = _fold(parameters, factors, x.dtype)
            for part in x.split(size):
                output, kept = _forward(part, folded, num_heads, eps, dropout, attn_dropout)
                outputs.append(output)
                if any(ctx.needs_input_grad):
                    saved.extend(kept)
        ctx.num_heads, ctx.size, ctx.factors = num_heads, size, factors
        ctx.save_for_backward(*parameters, *folded, *saved)
        joined = x.new_empty(x.shape)  # no view of another tensor: FSDP2 would warn of what may be done to it
        torch.cat(outputs, out=joined.view(-1, *outputs[0].shape[1:]))
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        tensors = list(ctx.saved_tensors)
        parameters = Parameters(*_take(tensors, Parameters))
        folded = _Folded(*_take(tensors, _Folded))
        inputs: list[Tensor] = []
        sums: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for part in g.split(ctx.size):
                before, grads = _backward(part, folded, _Saved(*_take(tensors, _Saved)), ctx.num_heads)
                inputs.append(before)
                if sums:
                    torch._foreach_add_(sums, [grad.to(parameters.qkv.dtype) for grad in grads])
                else:
                    sums = [grad.to(parameters.qkv.dtype) for grad in grads]
            unfolded = _unfold(_Folded(*sums), parameters, ctx.factors)
        return torch.cat(inputs).view_as(g), None, None, None, None, *unfolded


def _forward(
    x: Tensor, w: _Folded, num_heads: int, eps: float, dropout: float, attn_dropout: float
) -> tuple[Tensor, _Saved]:
    """A chunk's output `(r d)`, and what its backward pass needs."""
    b, n, d = x.shape
    x = x.reshape(b * n, d)
    normed1, mean1, rstd1 = torch.native_layer_norm(x, [d], None, None, eps)
    qkv = _linear(normed1, w.qkv, w.qkv_bias).view(b, n, 3, num_heads, d // num_heads)
    qkv = qkv.permute(2, 0, 3, 1, 4).reshape(3, b * num_heads, n, d // num_heads)
    q, k, v = qkv.unbind(0)
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    weights_mask = _mask(weights, attn_dropout)
    dropped = _drop(weights, weights_mask)
    mixed = torch.bmm(dropped, v).view(b, num_heads, n, d // num_heads).transpose(1, 2).reshape(b * n, d)
    y = _linear(mixed, w.proj, w.proj_bias, x)
    normed2, mean2, rstd2 = torch.native_layer_norm(y, [d], None, None, eps)
    hidden = _linear(normed2, w.fc1, w.fc1_bias)
    active_mask = _mask(hidden, dropout)
    active = _drop(F.gelu(hidden), active_mask)
    branch_mask = _mask(y, dropout)
    if branch_mask is None:
        output = _linear(active, w.fc2, w.fc2_bias, y)
    else:
        output = _drop(_linear(active, w.fc2, w.fc2_bias), branch_mask).add_(y)
    return output, _Saved(
        x, mean1, rstd1, normed1, qkv, weights, dropped, mixed, y, mean2, rstd2, normed2, hidden, active,
        weights_mask, active_mask, branch_mask,
    )  # fmt: skip


def _backward(g: Tensor, w: _Folded, s: _Saved, num_heads: int) -> tuple[Tensor, _Folded]:
    """The gradients of a chunk's output for its input, `(r d)` of `g`, and for the weights."""
    b, n, d = g.shape
    g = g.reshape(b * n, d)
    ones = g.new_ones(b * n)  # sums over rows are fastest as products

    branch = _drop(g, s.branch_mask)
    fc2, fc2_bias = branch.t() @ s.active, ones @ branch
    hidden = _aten.gelu_backward(_drop(branch @ w.fc2, s.active_mask), s.hidden)
    fc1 = s.normed2.t() @ hidden  # transposing the narrow matrix rather than the wide one saves a quarter
    fc1_bias = ones @ hidden
    g = _norm_backward(hidden @ w.fc1, s.y, s.mean2, s.rstd2).add_(g)

    proj, proj_bias = g.t() @ s.mixed, ones @ g
    q, k, v = s.qkv.unbind(0)
    mixed = (g @ w.proj).view(b, n, num_heads, d // num_heads).transpose(1, 2).reshape(q.shape)
    qkv = torch.empty_like(s.qkv)
    torch.bmm(s.dropped.transpose(1, 2), mixed, out=qkv[2])
    weights = _drop(torch.bmm(mixed, v.transpose(1, 2)), s.weights_mask)
    scores = _aten._softmax_backward_data(weights, s.weights, -1, g.dtype)
    torch.bmm(scores, k, out=qkv[0])
    torch.bmm(scores.transpose(1, 2), q, out=qkv[1])
    qkv = qkv.view(3, b, num_heads, n, d // num_heads).permute(1, 3, 0, 2, 4).reshape(b * n, 3 * d)
    weights_of = _Folded(s.normed1.t() @ qkv, ones @ qkv, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias)
    return _norm_backward(qkv @ w.qkv, s.x, s.mean1, s.rstd1).add_(g), weights_of


def _fold(p: Parameters, factors: _Factors, dtype: torch.dtype) -> _Folded:
    """W·(γ⊙x̂ + β) + b = (W·diag γ)·x̂ + (W·β + b), times the product's factor; in fp32, and at once into `dtype`."""
    qkv, fc1 = (torch.empty_like(weight, dtype=dtype) for weight in (p.qkv, p.fc1))
    third = len(qkv) // 3
    torch.mul(p.qkv[:third], p.scale1 * factors.queries, out=qkv[:third])
    torch.mul(p.qkv[third:], p.scale1, out=qkv[third:])
    qkv_bias = p.qkv_bias + p.qkv @ p.shift1
    qkv_bias[:third].mul_(factors.queries)
    return _Folded(
        qkv=qkv,
        qkv_bias=qkv_bias.to(dtype),
        proj=_scaled(p.proj, factors.mixed).to(dtype),
        proj_bias=p.proj_bias.to(dtype),
        fc1=torch.mul(p.fc1, p.scale2, out=fc1),
        fc1_bias=(p.fc1_bias + p.fc1 @ p.shift2).to(dtype),
        fc2=_scaled(p.fc2, factors.active**2).to(dtype),  # there is dropout before it and after
        fc2_bias=_scaled(p.fc2_bias, factors.active).to(dtype),
    )


def _unfold(g: _Folded, p: Parameters, factors: _Factors) -> Parameters:
    """Gradients for the parameters, from those for what `_fold` made of them."""
    qkv, fc1 = g.qkv.t().contiguous(), g.fc1.t().contiguous()  # later passes are faster over what lies in a row
    qkv[: len(qkv) // 3].mul_(factors.queries)
    g.qkv_bias[: len(qkv) // 3].mul_(factors.queries)
    return Parameters(
        scale1=(qkv * p.qkv).sum(0),
        shift1=g.qkv_bias @ p.qkv,
        qkv=qkv.mul_(p.scale1).addr_(g.qkv_bias, p.shift1),
        qkv_bias=g.qkv_bias,
        proj=_scaled(g.proj, factors.mixed),
        proj_bias=g.proj_bias,
        scale2=(fc1 * p.fc1).sum(0),
        shift2=g.fc1_bias @ p.fc1,
        fc1=fc1.mul_(p.scale2).addr_(g.fc1_bias, p.shift2),
        fc1_bias=g.fc1_bias,
        fc2=_scaled(g.fc2, factors.active**2),
        fc2_bias=_scaled(g.fc2_bias, factors.active),
    )


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b (+ residual): for bf16 in one pass, by an operation that torch keeps for its own compiler."""
    if x.dtype == torch.bfloat16 and _pointwise is not None:
        if residual is None:
            return _pointwise(x, weight, bias, "none", [], "")
        return _pointwise.binary(x, residual, weight, bias, "add")
    product = F.linear(x, weight, bias)
    return product if residual is None else product.add_(residual)


def _linear_flops(x_shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * prod(out_shape) * x_shape[-1]


_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _pointwise is not None and _pointwise not in flop_registry:  # torch's counter of FLOPs knows public names alone
    register_flop_formula(_pointwise)(_linear_flops)


def _norm_backward(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    wanted = [True, False, False]  # there is neither scale nor shift
    return _aten.native_layer_norm_backward(g, x, [x.shape[-1]], mean, rstd, None, None, wanted)[0]


def _rate(probability: float) -> float:
    return round(probability * _STEPS) / _STEPS


def _mask(like: Tensor, rate: float) -> Tensor | None:
    """For each element of `like` an integer as wide, all bits set with probability 1 − rate, else none."""
    if not rate:
        return None
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_()  # 63 bits: fifteen for each of four
    bits = draws.view(torch.int16)[: like.numel()].bitwise_and_(_STEPS - 1)
    kept = torch.rsub(bits, int(rate * _STEPS) - 1).bitwise_right_shift_(15)  # the sign, in every bit
    return kept.view(like.shape).to(_BITS[like.element_size()])


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask is set, else zero: dropout but for its factor 1/(1 − p), which the weights carry."""
    return x if mask is None else (x.view(mask.dtype) & mask).view(x.dtype)


def _take(tensors: list[Any], fields: type[NamedTuple]) -> list[Any]:
    """As many tensors as `fields` has, taken from the front of the list."""
    count = len(fields._fields)
    taken, tensors[:count] = tensors[:count], []
    return taken
