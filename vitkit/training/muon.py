"""Muon: the momentum's nearest orthogonal matrix as the step of each weight matrix.

torch has this optimiser too, but its iteration is always in bf16, which a processor without a bf16 unit emulates: the optimiser
then takes 60 % of a small network's step. It also takes one matrix at a time, and no sharded ones.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vitkit.distributed.fsdp import full_tensor, is_sharded, local, shard_like
from vitkit.training.processor import has_fast_bf16
from vitkit.validation import at_least, one_of

STACK_ELEMENTS = 2**24
"""Most elements of the matrices that are orthogonalised in one product: it bounds the memory."""

LR_SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}


class Muon(Optimizer):
    """Muon (Jordan et al., 2024) for weight matrices W `(rows columns)` with gradient G:

        B ← μ·B + (1 − μ)·G                       the momentum
        U = (1 − μ)·G + μ·B                       with nesterov, else U = B
        W ← (1 − lr·weight_decay)·W − lr·scale·orthogonalise(U)

    The arguments, the result within rounding, and the state are those of `torch.optim.Muon`: each loads the other's state dict.
    `adjust_lr_fn` chooses scale: "original" (None) is √max(1, rows/columns), "match_rms_adamw" 0.2·√max(rows, columns) (arXiv
    2502.16982), "spectral_unclamped" √(rows/columns). The iteration computes in bf16 where the device has units for it, else in
    fp32.

    Ranks: of sharded weights each rank gathers the update, orthogonalises it and keeps its own part; all other state stays
    sharded. Raises `UsageError` for arguments out of range, `ValueError` for parameters that are no matrices.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        at_least(0, lr=lr, weight_decay=weight_decay, momentum=momentum, ns_steps=ns_steps)
        one_of((None, *LR_SCALES), adjust_lr_fn=adjust_lr_fn)
        super().__init__(params, {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        })  # fmt: skip
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices; a parameter has the shape {tuple(parameter.shape)}: give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)  # type: ignore[arg-type]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters]  # type: ignore[arg-type]
        torch._foreach_lerp_([local(buffer) for buffer in buffers], gradients, 1 - group["momentum"])
        updates = [
            gradient.lerp(local(buffer), group["momentum"]) if group["nesterov"] else local(buffer)
            for gradient, buffer in zip(gradients, buffers, strict=True)
        ]
        # A rank holds only its part of a sharded update, so the other parts are gathered.
        complete = [full_tensor(like_shards(update, p)) for update, p in zip(updates, parameters, strict=True)]
        steps = orthogonalise_all(complete, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_([local(p) for p in parameters], 1 - float(group["lr"]) * group["weight_decay"])
        scale = LR_SCALES[group["adjust_lr_fn"] or "original"]
        for parameter, step in zip(parameters, steps, strict=True):
            part = local(shard_like(step.to(parameter.dtype), parameter))
            local(parameter).add_(part, alpha=-float(group["lr"]) * scale(*parameter.shape))


def like_shards(part: Tensor, like: Any) -> Tensor:
    """A rank's part of a tensor as a tensor that is sharded as `like` is; the part itself if `like` is not sharded."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def orthogonalise_all(
    matrices: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """`orthogonalise` of each matrix; matrices of one shape, or of its transpose, share their products."""
    stacks: dict[Any, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        stacks[(tuple(sorted(matrix.shape)), matrix.device)].append(number)
    results: list[Tensor] = list(matrices)
    for (shape, device), numbers in stacks.items():
        dtype = torch.bfloat16 if has_fast_bf16(device.type) else torch.float32
        count = max(1, STACK_ELEMENTS // math.prod(shape))
        for chunk in (numbers[start : start + count] for start in range(0, len(numbers), count)):
            tall = [matrices[number].shape[0] > matrices[number].shape[1] for number in chunk]
            wide = [matrices[n].T if is_tall else matrices[n] for n, is_tall in zip(chunk, tall, strict=True)]
            stack = orthogonalise(torch.stack(wide).to(dtype), coefficients, steps, eps)
            for number, is_tall, step in zip(chunk, tall, stack, strict=True):
                results[number] = step.T if is_tall else step
    return results


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton–Schulz iteration X ← P·X, P = a + b·A + c·A², A = X·Xᵀ, from X / ‖X‖: matrices `(k m n)`, m ≤ n.

    Singular values end between 0.7 and 1.2 with the usual coefficients and five steps. Of wide matrices in fp32 only the small
    A `(k m m)` is iterated, A ← P·A·P, and the product of all P is applied at the end: a third fewer operations. Rounding grows
    by a² a step there, to 1e-4 after five of them; bf16 is too coarse for it.
    """
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    gram = x @ x.mT
    if x.dtype != torch.float32 or x.shape[2] < 2 * x.shape[1] or not 0 < steps <= 5:
        for step in range(steps):
            gram = x @ x.mT if step else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    p = product = _polynomial(gram, coefficients)
    for _step in range(steps - 1):
        gram = p @ (gram @ p)
        p = _polynomial(gram, coefficients)
        product = p @ product
    return product @ x


def _polynomial(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a + b·A + c·A² of matrices A `(k m m)`."""
    a, b, c = coefficients
    p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal(dim1=1, dim2=2).add_(a)
    return p


__all__ = ["Muon", "orthogonalise", "orthogonalise_all"]
