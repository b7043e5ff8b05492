"""The loss of DINO: the student's distribution over prototypes follows the teacher's of another view."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit.distributed import all_gather, all_reduce_sum
from vitkit.errors import UsageError
from vitkit.validation import at_least, in_range, one_of, positive


class DINOLoss(nn.Module):
    """The cross entropy −Σ_k q_k ln p_k between the teacher's q and the student's p over K = `out_dim` prototypes, in nats.

        p_s = softmax(x_s / τ_s),   q_t = softmax((y_t − c) / τ_t)   or   Sinkhorn–Knopp of exp(y_t / τ_t),

    a mean over samples and all pairs (t, s) of a teacher's and a student's view, without t = s: view t of the teacher is the same crop
    as view t of the student.

    - `centring`: "mean" subtracts c, a moving average of the teacher's outputs: c ← m·c + (1 − m)·mean(y) after each step of training,
      with m = `centre_momentum`. "sinkhorn" makes all prototypes equally frequent among the views of a batch, by `iterations`
      normalisations over samples and prototypes in turn; it keeps no state, and it does not depend on how fast c follows.
    - τ_s is `student_temperature`. τ_t rises linearly from `warmup_temperature` to `teacher_temperature` in the first share `warmup`
      of the steps; `run.fit` calls `set_step`. The defaults, 0.02, are lower than the paper's 0.04 to 0.07: in the first steps the features
      of all images are similar, and a soft teacher is nearly uniform.

    Call: outputs of the student `(s n K)` and of the teacher `(t n K)`, s ≥ t, without a gradient for the teacher → "loss",
    "teacher_entropy", the mean entropy of q, and "marginal_entropy", the entropy of the mean of q. A teacher that gives every image
    the same distribution has equal entropies: both 0 for one prototype, both ln K for a uniform one. `uninformed` is ln K, the loss of a
    uniform student. Everything is computed in fp32, also under autocast.

    Ranks: means, c and Sinkhorn–Knopp are over the samples of all ranks, whose numbers may differ. Raises `UsageError` for values out of
    range, shapes that do not fit, and a single pair of the same view.

    Source: Caron et al., DINO, arXiv 2104.14294; Sinkhorn–Knopp as in SwAV, arXiv 2006.09882, and DINOv2, arXiv 2304.07193. With
    centring "mean" it equals lightly's `DINOLoss`.
    """

    centre: Tensor

    def __init__(
        self,
        out_dim: int,
        centring: Literal["mean", "sinkhorn"] = "sinkhorn",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.02,
        warmup_temperature: float = 0.02,
        warmup: float = 0.3,
        centre_momentum: float = 0.9,
        iterations: int = 3,
    ) -> None:
        super().__init__()
        at_least(1, out_dim=out_dim, iterations=iterations)
        one_of(("mean", "sinkhorn"), centring=centring)
        positive(student_temperature=student_temperature, teacher_temperature=teacher_temperature, warmup_temperature=warmup_temperature)
        in_range(0, 1, warmup=warmup, centre_momentum=centre_momentum)
        self.out_dim, self.centring, self.iterations = out_dim, centring, iterations
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.warmup_temperature, self.warmup, self.centre_momentum = warmup_temperature, warmup, centre_momentum
        self.register_buffer("centre", torch.zeros(out_dim))
        self.temperature = teacher_temperature

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"out_dim": 8}, {"student": torch.randn(3, samples, 8), "teacher": torch.randn(2, samples, 8) / 4}

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """ln K: the loss of a uniform student, and the entropies of a uniform teacher."""
        return dict.fromkeys(("loss", "teacher_entropy", "marginal_entropy"), math.log(self.out_dim))

    def set_step(self, step: int, total: int) -> None:
        """Set τ_t for the step of the optimiser that comes next."""
        share = min(step / (self.warmup * total), 1.0) if self.warmup else 1.0
        self.temperature = self.warmup_temperature + (self.teacher_temperature - self.warmup_temperature) * share

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        views, targets = len(student), len(teacher)
        shapes_fit = student.ndim == teacher.ndim == 3 and student.shape[1:] == teacher.shape[1:] and student.shape[2] == self.out_dim
        if not shapes_fit or targets > views or views * targets < 2:
            raise UsageError(
                f"outputs are {tuple(student.shape)} and {tuple(teacher.shape)}; expected (s, n, {self.out_dim}) of the student and "
                f"(t, n, {self.out_dim}) of the teacher, s >= t, and two views or more of the student"
            )
        with torch.autocast(student.device.type, enabled=False):
            log_p = (student.float() / self.student_temperature).log_softmax(dim=-1)
            q = self._targets(teacher.detach().float())
            pairs = -torch.einsum("tnk,snk->ts", q, log_p)
            other = ~torch.eye(targets, views, dtype=torch.bool, device=pairs.device)
            entropy = -torch.xlogy(q, q).sum()
            count = pairs.new_tensor(float(student.shape[1]))
            sums = all_reduce_sum(torch.cat([torch.stack([pairs[other].sum(), entropy, count]), q.sum(dim=(0, 1))]))
            samples = sums[2].detach().clamp(min=1)
            marginal = sums[3:].detach() / (targets * samples)
            return {
                "loss": sums[0] / (int(other.sum()) * samples),
                "teacher_entropy": sums[1].detach() / (targets * samples),
                "marginal_entropy": -torch.xlogy(marginal, marginal).sum(),
            }

    @torch.no_grad()
    def _targets(self, teacher: Tensor) -> Tensor:
        """q `(t n K)`; in training mode c follows the teacher's outputs."""
        if self.centring == "sinkhorn":
            rows = teacher.flatten(0, 1) / self.temperature
            return sinkhorn(rows, self.iterations).unflatten(0, teacher.shape[:2])
        q = ((teacher - self.centre) / self.temperature).softmax(dim=-1)
        if self.training:
            count = teacher.new_tensor([float(teacher.shape[0] * teacher.shape[1])])
            sums = all_reduce_sum(torch.cat([teacher.sum(dim=(0, 1)), count]))
            if sums[-1] > 0:
                self.centre.lerp_(sums[:-1] / sums[-1], 1 - self.centre_momentum)
        return q


@torch.no_grad()
def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Probabilities `(n K)` of each row of logits, with prototypes that are equally frequent over the rows of all ranks.

    From exp(logits), each iteration divides by the sums over all rows, then by the sums over prototypes. Rows sum to one.
    """
    tiny = torch.finfo(logits.dtype).tiny
    # A common factor does not matter: the largest of all logits keeps exp finite.
    highest = all_gather(logits.amax()[None] if logits.numel() else logits.new_full((1,), -math.inf)).amax()
    q = (logits - highest).exp()
    for _ in range(iterations):
        q = q / all_reduce_sum(q.sum(dim=0)).clamp(min=tiny)
        q = q / q.sum(dim=1, keepdim=True).clamp(min=tiny)
    return q


__all__ = ["DINOLoss", "sinkhorn"]
