"""Learning-rate schedules as plain torch schedulers, stepped once an optimiser step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vitkit.errors import UsageError


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
