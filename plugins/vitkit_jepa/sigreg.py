"""SIGReg: the distance of embeddings from an isotropic Gaussian, along random directions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.distributed import all_reduce_sum, broadcast
from vitkit.errors import UsageError
from vitkit.validation import at_least, positive


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularisation: the Epps–Pulley statistic of random one-dimensional projections.

    For the projections z `(n k)` of one view, unit directions a_s drawn at each call, knots t_j evenly
    on [0, limit], φ(t) = exp(−t²/2) and trapezoid weights w_j over [−limit, limit] times the window φ:

        T_s = n · Σ_j w_j [(C_sj − φ(t_j))² + S_sj²],  C_sj, S_sj = means over n of cos, sin(t_j·(a_s·z)),

    averaged over directions and views. For z ~ N(0, I) the expectation of T is `floor`, 1.0525 for any n. For z = 0, T is
    0.4020·n (with 17 knots on [0, 3]).

    Call: projections `(v n k)` or `(n k)` → {"loss", "sigreg"}, both T. `present` `(v n)` bool is false for a view that a
    sample does not have. It is left out of means and n, and a view that no sample has is left out completely. Phases are
    computed in fp32, also under autocast.

    Ranks: C, S and n are those of the whole batch; the parts of the ranks may differ in size. Every rank uses the
    directions of rank 0, drawn from torch's global generator. T is equal on every rank. Its gradient follows
    `vitkit.distributed.collectives`.

    Raises `UsageError` if there are fewer than one direction or two knots, if the limit is not positive, or if projections
    have another shape.

    Source: Balestriero and LeCun, LeJEPA, arXiv 2511.08544. The domain [−3, 3] by symmetry, the 17 knots and the window are
    those of its reference code and of lightly's `SIGReg`, which draws 1,024 directions; the paper's listing integrates over
    [−5, 5]. lightly computes in the dtype of its input and needs the same number of samples on each rank.
    """

    phi: Tensor
    weights: Tensor

    def __init__(self, directions: int = 256, knots: int = 17, limit: float = 3.0) -> None:
        super().__init__()
        at_least(1, directions=directions)
        at_least(2, knots=knots)
        positive(limit=limit)
        self.directions, self.knots, self.limit = directions, knots, limit
        step = limit / (knots - 1)
        t = torch.linspace(0.0, limit, knots)[1:]  # at t = 0 both terms vanish for any z
        phi = torch.exp(-t.square() / 2)
        trapezoid = torch.full((knots - 1,), 2 * step)
        trapezoid[-1] = step
        self.register_buffer("phi", phi, persistent=False)
        self.register_buffer("weights", trapezoid * phi, persistent=False)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        present = torch.ones(2, samples, dtype=torch.bool)
        present[1, 1::2] = False
        return {"directions": 16}, {"projections": torch.randn(2, samples, 8), "present": present}

    @property
    def floor(self) -> float:
        """The expectation for z ~ N(0, I), Σ_j w_j (1 − φ(t_j)²): 1.0525 with 17 knots on [0, 3]."""
        return float((self.weights * (1 - self.phi.square())).sum())

    def uninformed(self, batch_size: int) -> dict[str, float]:
        """The value for embeddings that are all zero, n · Σ_j w_j (1 − φ(t_j))²: 0.4020·n with 17 knots on [0, 3]."""
        collapsed = batch_size * float((self.weights * (1 - self.phi).square()).sum())
        return {"loss": collapsed, "sigreg": collapsed}

    def forward(self, projections: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        z = projections[None] if projections.ndim == 2 else projections
        if z.ndim != 3:
            raise UsageError(f"projections are {tuple(projections.shape)}, expected (views, samples, dim)")
        if present is not None and present.shape != z.shape[:2]:
            raise UsageError(
                f"present is {tuple(present.shape)}, expected (views, samples) = {tuple(z.shape[:2])}"
            )
        with torch.autocast(z.device.type, enabled=False):
            statistic = self._statistic(z.float(), None if present is None else present.float())
        return {"loss": statistic, "sigreg": statistic}

    def _statistic(self, z: Tensor, present: Tensor | None) -> Tensor:
        a = torch.randn(z.shape[-1], self.directions, device=z.device)
        a = broadcast(a / a.norm(dim=0))
        present = z.new_ones(z.shape[:2]) if present is None else present
        n = all_reduce_sum(present.sum(dim=1))  # (v)
        sums = _WaveSums.apply(z @ a, present, self.limit / (self.knots - 1), self.knots - 1)  # (2 knots v s)
        cos, sin = all_reduce_sum(sums) / n.clamp(min=1)[:, None]
        error = (cos - self.phi[:, None, None]).square() + sin.square()  # (knots v s)
        per_view = n * torch.einsum("j,jvs->v", self.weights, error) / self.directions
        return per_view.sum() / (n > 0).sum().clamp(min=1)


class _WaveSums(torch.autograd.Function):
    """Σ_n m·cos(t_j·p) and Σ_n m·sin(t_j·p) for t_j = step, 2·step, ...: p `(v n s)`, m `(v n)` → `(2 knots v s)`.

    The knots are computed one after another, and a second time in the backward pass, because autograd would keep
    `2·knots` tensors of p's size.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, m: Tensor, step: float, knots: int) -> Tensor:
        ctx.save_for_backward(p, m)
        ctx.step, ctx.knots = step, knots
        rows = m[:, None]  # (v 1 n)
        sums = [(rows @ cos, rows @ sin) for cos, sin in _waves(p, step, knots)]  # each (v 1 s)
        return torch.stack([torch.cat(wave, dim=1) for wave in sums]).permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        p, m = ctx.saved_tensors
        t = ctx.step * torch.arange(1, ctx.knots + 1, device=p.device)
        for_cos, for_sin = (grad * t[:, None, None])[..., None, :]  # each (knots v 1 s)
        total = torch.zeros_like(p)
        for (cos, sin), cos_grad, sin_grad in zip(_waves(p, ctx.step, ctx.knots), for_cos, for_sin, strict=True):
            total.addcmul_(cos, sin_grad).addcmul_(sin, cos_grad, value=-1.0)
        return total * m[..., None], None, None, None


def _waves(p: Tensor, step: float, knots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos and sin of j·step·p for j = 1, ..., `knots`: each turns the one before by the first, which costs no cos or sin."""
    x = p * step
    first_cos, first_sin = x.cos(), x.sin()
    cos, sin = first_cos, first_sin
    yield cos, sin
    for _ in range(knots - 1):
        cos, sin = (
            (cos * first_cos).addcmul_(sin, first_sin, value=-1.0),
            (sin * first_cos).addcmul_(cos, first_sin),
        )
        yield cos, sin
