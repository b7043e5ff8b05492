"""The optimiser and the schedule of the VAE recipes."""

from typing import Any, Literal

from torch import nn
from torch.optim.lr_scheduler import LRScheduler, StepLR

from vitkit.training import muon_adamw, warmup_cosine

STEP_FACTOR = 0.3
"""The learning rate's factor after each third of the training, with the schedule "step"."""
WARMUP_STEPS = 100


def scheduled(
    model: nn.Module,
    *,
    lr: float,
    optimizer: Literal["muon", "adamw"],
    schedule: Literal["cosine", "step"],
    steps: int,
    epoch_steps: int,
) -> tuple[Any, LRScheduler]:
    """Muon with AdamW, or only AdamW, and a schedule over `steps` steps; an epoch has `epoch_steps`.

    "cosine": 100 steps of warm-up (at most one epoch), then a cosine to zero. "step": the learning rate is multiplied by
    0.3 after each third.
    """
    optimiser = muon_adamw(model, lr=lr, only_adamw=model.parameters() if optimizer == "adamw" else ())
    if schedule == "step":
        return optimiser, StepLR(optimiser, step_size=max(1, steps // 3), gamma=STEP_FACTOR)
    return optimiser, warmup_cosine(optimiser, steps, warmup=min(WARMUP_STEPS, epoch_steps))
