"""Optimisers and schedules as plain torch objects: Muon for matrices beside AdamW for the rest, warm-up and cosine."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vitkit.distributed.fsdp import full_tensor, is_sharded, local, shard_like
from vitkit.errors import UsageError


class ChainedOptimizer(Optimizer):
    """Several optimisers, each with its own parameters, as one: for `run.fit` and for schedules.

    Its parameter groups are theirs, so that a schedule acts on all. Raises `UsageError` where two share a parameter.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        if len({id(p) for p in parameters}) < len(parameters):
            raise UsageError("two optimisers share a parameter; give each of them its own")
        self.optimizers = optimizers
        super().__init__(parameters, {})
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


OPTIONS = inspect.signature(Muon).parameters.keys() - {"params"}


class _Muon(Muon):
    """torch's Muon, for weights that are sharded over ranks too: each matrix is gathered, stepped as a whole, and cut again."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not any(is_sharded(p) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            options = {name: group[name] for name in OPTIONS if name in group}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                matrix = nn.Parameter(full_tensor(parameter))
                matrix.grad = full_tensor(parameter.grad)
                alone = Muon([matrix], **options)
                alone.state[matrix].update(full_tensor(self.state[parameter]))
                alone.step()
                local(parameter).copy_(local(shard_like(matrix.detach(), parameter)))
                self.state[parameter].update({k: shard_like(v, parameter) for k, v in alone.state[matrix].items()})
        return loss


def muon_adamw(
    model: nn.Module,
    *,
    lr: float,
    muon_lr: float | None = None,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    only_adamw: Iterable[nn.Parameter] = (),
) -> ChainedOptimizer:
    """Muon for the weight matrices inside a network, AdamW for embeddings, biases, norms and convolutions.

    Muon (Jordan et al., 2024) steps along the orthogonalised momentum, scaled to AdamW's usual step so that the same
    learning rates do (arXiv 2502.16982); `muon_lr` is `lr` where not given. Matrices of `nn.Linear` go to Muon, save
    those in `only_adamw`; weight decay spares biases, norms and single vectors. Raises `UsageError` where a learning
    rate is not positive, weight decay is negative or either not finite, and for a model of which nothing is trained.
    """
    muon_lr = lr if muon_lr is None else muon_lr
    if not (lr > 0 and muon_lr > 0 and math.isfinite(lr + muon_lr)):
        raise UsageError(f"lr is {lr} and muon_lr {muon_lr}; expected finite positive numbers")
    _check_decay(weight_decay)
    trained, kept = _trained(model), {id(parameter) for parameter in only_adamw}
    inside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - kept  # tied ones once
    matrices = [p for p in trained if id(p) in inside]
    rest = [p for p in trained if id(p) not in inside]
    found: list[Optimizer] = []
    if matrices:
        found.append(_Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        found.append(AdamW(_groups(rest, weight_decay), lr=lr, betas=betas, fused=True))
    return ChainedOptimizer(*found)


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.999)) -> AdamW:
    """torch's AdamW for what of a network is trained; weight decay spares biases, norms and single vectors.

    Raises `UsageError` where the learning rate or the weight decay is not a finite number of at least 0, and for a model of
    which nothing is trained.
    """
    if not (math.isfinite(lr) and lr >= 0):
        raise UsageError(f"lr is {lr}; expected a finite learning rate of at least 0")
    _check_decay(weight_decay)
    return AdamW(_groups(_trained(model), weight_decay), lr=lr, betas=betas, fused=True)


def _check_decay(weight_decay: float) -> None:
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise UsageError(f"weight_decay is {weight_decay}; expected a finite number of at least 0")


def _trained(model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no parameter to train: all are frozen (requires_grad is False), or it has none"
        )
    return found


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: int = 0, floor: float = 0.0) -> LambdaLR:
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor` times the learning rate at `steps`.

    lr(t) = lr·(t+1)/warmup for t < warmup, then lr·(floor + (1 − floor)·(1 + cos(π·(t − warmup)/(steps − warmup)))/2).
    Raises `UsageError` where `warmup` is longer than `steps` or `floor` lies outside [0, 1].
    """
    if steps < 1 or not 0 <= warmup <= steps:
        raise UsageError(f"a schedule of {steps} steps with {warmup} of warm-up; expected 0 <= warmup <= steps, steps >= 1")
    if not 0.0 <= floor <= 1.0:
        raise UsageError(f"a schedule's floor is a share of the learning rate in [0, 1]; given {floor}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * share)) / 2.0

    return LambdaLR(optimizer, factor)
