"""A momentum teacher: a copy of a network whose weights follow the network's."""

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitkit.distributed.fsdp import local
from vitkit.training.schedules import Schedule, constant
from vitkit.validation import in_range


class MomentumTeacher(nn.Module):
    """A copy of `student` without gradients: θ̄ ← m·θ̄ + (1 − m)·θ after each step of the optimiser.

    `momentum` is m, a number in [0, 1] or a schedule of (step, total), such as `cosine(0.996, 1.0)`. Keep the teacher as an attribute
    of the model beside the student:

        self.student = nn.Sequential(backbone, projector)
        self.teacher = MomentumTeacher(self.student, cosine(0.996, 1.0))

    `run.fit` then updates it, and its weights are part of the model's state: checkpoints hold them, and a run resumes with them. Calling
    it calls the copy under `torch.no_grad`. Buffers, such as the statistics of a batch norm, are not averaged: the copy computes its own.

    `run.save(model)` saves the parts that are attributes of the model, not the parts within the teacher. To evaluate or save the
    teacher, use `model.teacher.module`.

    Ranks: every rank computes the same update; sharded weights are updated part by part. Source: Grill et al., arXiv 2006.07733.
    Raises `UsageError` for a momentum outside [0, 1].
    """

    def __init__(self, student: nn.Module, momentum: float | Schedule = 0.996) -> None:
        super().__init__()
        if not callable(momentum):
            in_range(0, 1, momentum=momentum)
        self.module = copy.deepcopy(student).requires_grad_(False)
        self._student = [student]  # in a list, so that it is not a part of this module too
        self._momentum: Schedule = momentum if callable(momentum) else constant(momentum)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Move towards the student; the loop calls this after step number `step`, counted from 0, of `total`."""
        teacher = [local(parameter.detach()) for parameter in self.module.parameters()]
        student = [local(parameter.detach()) for parameter in self._student[0].parameters()]
        get_ema_multi_avg_fn(self._momentum(step, total))(teacher, student, 0)


__all__ = ["MomentumTeacher"]
