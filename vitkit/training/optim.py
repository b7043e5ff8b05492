"""Optimisers and schedules as plain torch objects: Muon for hidden matrices, AdamW, warm-up and cosine."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vitkit.errors import UsageError
from vitkit.training.muon import Muon
from vitkit.validation import at_least, in_range, positive


class ChainedOptimizer(Optimizer):
    """Several optimisers, each with its own parameters, as one: for `run.fit` and for schedules.

    It has the parameter groups of all of them, so a schedule acts on each. Raises `UsageError` if two share a parameter.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        if len({id(p) for p in parameters}) < len(parameters):
            raise UsageError("two optimisers share a parameter; give each parameter to one of them")
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


def muon_adamw(
    model: nn.Module,
    *,
    lr: float,
    muon_lr: float | None = None,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    only_adamw: Iterable[nn.Parameter] = (),
    layer_decay: float | None = None,
) -> ChainedOptimizer:
    """Muon for the hidden weight matrices of a network, AdamW for all its other parameters.

    Muon (Jordan et al., 2024) steps along the orthogonalised momentum, scaled to AdamW's usual step size so that both take the
    same learning rates (arXiv 2502.16982); `muon_lr` defaults to `lr`. Muon gets the weights of `nn.Linear` except
    those in `only_adamw` and those of last layers: the parameters that a module names in its method `output_weights()`.

    `weight_decay` and `layer_decay` are as for `adamw`. Raises `UsageError` for a learning rate that is not positive, other
    values out of range, and a model without a trainable parameter.
    """
    muon_lr = lr if muon_lr is None else muon_lr
    positive(lr=lr, muon_lr=muon_lr)
    at_least(0, weight_decay=weight_decay)
    trained, kept = _trainable(model), {id(parameter) for parameter in only_adamw} | _named(model, "output_weights")
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - kept  # tied ones once
    scales = _layer_scales(model, layer_decay)
    hidden = _groups([p for p in trained if id(p) in linear], muon_lr, weight_decay, set(), scales)
    others = _groups([p for p in trained if id(p) not in linear], lr, weight_decay, _named(model, "no_weight_decay"), scales)
    optimizers: list[Optimizer] = []
    if hidden:
        optimizers.append(Muon(hidden, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(AdamW(others, betas=betas, fused=True))
    return ChainedOptimizer(*optimizers)


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    layer_decay: float | None = None,
) -> AdamW:
    """torch's AdamW for the trainable parameters of a network.

    Weight decay leaves out parameters of at most one dimension (biases, norms) and the parameters that a module names in its method
    `no_weight_decay()`, as in timm: CLS and register tokens, positions, label types.

    `layer_decay` in (0, 1] makes learning rates smaller towards the input, for fine-tuning (BEiT, arXiv 2106.08254): a module
    with L `blocks` trains block i of 0 … L − 1 with lr·layer_decay^(L − i), its modules and tokens before the blocks with
    lr·layer_decay^(L + 1), all other parameters with lr. A module whose blocks lie in several stages offers `layers_in_order()`, the
    list of its L modules from the input on; layer i has lr·layer_decay^(L − i).

    Raises `UsageError` for a value that is out of range and for a model without a trainable parameter.
    """
    at_least(0, lr=lr, weight_decay=weight_decay)
    groups = _groups(_trainable(model), lr, weight_decay, _named(model, "no_weight_decay"), _layer_scales(model, layer_decay))
    return AdamW(groups, betas=betas, fused=True)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError(
            f"{type(model).__name__} has no parameter to train: all are frozen (requires_grad is False), or it has none"
        )
    return parameters


def _named(model: nn.Module, method: str) -> set[int]:
    """Ids of the parameters that the modules of `model` name by `method`, which returns names as in `named_parameters`."""
    return {
        id(parameter)
        for module in model.modules()
        if callable(names := getattr(module, method, None))
        for name, parameter in module.named_parameters()
        if name in names()
    }


def _layer_scales(model: nn.Module, layer_decay: float | None) -> dict[int, float]:
    """The factor of the learning rate by a parameter's id; 1 for parameters that are not listed."""
    scales: dict[int, float] = {}
    if layer_decay is None:
        return scales
    in_range(0, 1, layer_decay=layer_decay, low_included=False)
    staged: set[int] = set()
    for module in model.modules():
        if callable(layers := getattr(module, "layers_in_order", None)):
            groups = [list(layer.parameters()) for layer in layers()]
            for depth, group in enumerate(groups):
                scales |= {id(parameter): layer_decay ** (len(groups) - depth) for parameter in group}
            staged |= {id(part) for part in module.modules()}
        blocks = getattr(module, "blocks", None)
        if id(module) in staged or not isinstance(blocks, nn.Sequential | nn.ModuleList):
            continue
        names = list(dict(module.named_children()))
        after = tuple(f"{name}." for name in names[names.index("blocks") + 1 :])
        for name, parameter in module.named_parameters():
            depth = int(name.split(".")[1]) if name.startswith("blocks.") else -1
            if not name.startswith(after):
                scales[id(parameter)] = layer_decay ** (len(blocks) - depth)
    return scales


def _groups(
    parameters: list[nn.Parameter], lr: float, weight_decay: float, spared: set[int], scales: dict[int, float]
) -> list[dict[str, Any]]:
    """Parameter groups of one learning rate and weight decay each; the largest learning rate and the decayed ones first."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        decay = 0.0 if parameter.ndim <= 1 or id(parameter) in spared else weight_decay
        groups.setdefault((lr * scales.get(id(parameter), 1.0), decay), []).append(parameter)
    return [
        {"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in sorted(groups, key=lambda key: (-key[0], -key[1]))
    ]


def warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: int = 0, floor: float = 0.0) -> LambdaLR:
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor` times the learning rate at `steps`.

    lr(t) = lr·(t+1)/warmup for t < warmup, then lr·(floor + (1 − floor)·(1 + cos(π·(t − warmup)/(steps − warmup)))/2).
    Raises `UsageError` if `warmup` is longer than `steps` or `floor` lies outside [0, 1].
    """
    if steps < 1 or not 0 <= warmup <= steps:
        raise UsageError(f"a schedule of {steps} steps with {warmup} of warm-up; expected 0 <= warmup <= steps, steps >= 1")
    in_range(0, 1, floor=floor)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * share)) / 2.0

    return LambdaLR(optimizer, factor)
