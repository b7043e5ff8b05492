"""SIGReg: how far embeddings are from an isotropic Gaussian, seen along random directions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.distributed import all_reduce_sum, broadcast
from vitkit.errors import UsageError


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularisation: the Epps–Pulley statistic of random one-dimensional projections.

    For the projections z `(n k)` of one view, unit directions a_s drawn anew at each call, knots t_j evenly on
    [0, limit], φ(t) = exp(−t²/2) and trapezoid weights w_j over [−limit, limit] times the window φ:

        T_s = n · Σ_j w_j [(C_sj − φ(t_j))² + S_sj²],  C_sj, S_sj = means over n of cos, sin(t_j·(a_s·z)),

    averaged over directions and views. For z ~ N(0, I) its expectation is 1.0525 whatever n is, and for z = 0 it is
    0.4020·n (at 17 knots on [0, 3]).

    Call: projections `(v n k)` or `(n k)` → {"loss", "sigreg"}, both T. `present` `(v n)` bool leaves samples that have
    no such view out of means and n; a view that nobody has counts as none. Phases are computed in fp32, under autocast
    too.

    Ranks: C, S and n are those of the whole batch, over parts that may differ in size, and every rank uses rank 0's
    directions; T is the same everywhere, its gradient by the convention of `vitkit.distributed`. Directions come from
    torch's global generator.

    Raises `UsageError` for fewer than one direction or two knots, a limit that is not positive, or other shapes.

    Source: Balestriero and LeCun, LeJEPA, arXiv 2511.08544. Domain [−3, 3] by symmetry, 17 knots and the window are
    those of its reference code and of lightly's `SIGReg`, which draws 1,024 directions; the paper's listing integrates
    over [−5, 5]. lightly computes in the dtype it is given and lets samples through only in equal numbers.
    """

    phi: Tensor
    weights: Tensor

    def __init__(self, directions: int = 256, knots: int = 17, limit: float = 3.0) -> None:
        super().__init__()
        for name, value, least in (("directions", directions, 1), ("knots", knots, 2)):
            if value < least:
                raise UsageError(f"{name} is {value}, expected a whole number of at least {least}")
        if not limit > 0:
            raise UsageError(f"limit is {limit}, expected a positive number: the largest t that the statistic looks at")
        self.directions, self.knots, self.limit = directions, knots, limit
        step = limit / (knots - 1)
        t = torch.linspace(0.0, limit, knots)[1:]  # at t = 0 both terms vanish for any z
        phi = torch.exp(-t.square() / 2)
        trapezoid = torch.full((knots - 1,), 2 * step)
        trapezoid[-1] = step
        self.register_buffer("phi", phi, persistent=False)
        self.register_buffer("weights", trapezoid * phi, persistent=False)

    def forward(self, projections: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        z = projections[None] if projections.ndim == 2 else projections
        if z.ndim != 3:
            raise UsageError(f"projections are {tuple(projections.shape)}, expected (views, samples, dim)")
        if present is not None and present.shape != z.shape[:2]:
            raise UsageError(f"present is {tuple(present.shape)}, expected (views, samples) = {tuple(z.shape[:2])}")
        with torch.autocast(z.device.type, enabled=False):
            statistic = self._statistic(z.float(), None if present is None else present.float())
        return {"loss": statistic, "sigreg": statistic}

    def _statistic(self, z: Tensor, present: Tensor | None) -> Tensor:
        a = torch.randn(z.shape[-1], self.directions, device=z.device)
        a = broadcast(a / a.norm(dim=0))
        counts = z.new_full((z.shape[0],), z.shape[1]) if present is None else present.sum(dim=1)  # (v)
        sums = _WaveSums.apply(z @ a, self.limit / (self.knots - 1), self.knots - 1, present)  # (2 knots v s)
        n = all_reduce_sum(counts)
        cos, sin = all_reduce_sum(sums) / n.clamp(min=1)[:, None]
        error = (cos - self.phi[:, None, None]).square() + sin.square()  # (knots v s)
        per_view = n * torch.einsum("j,jvs->v", self.weights, error) / self.directions
        return per_view.sum() / (n > 0).sum().clamp(min=1)


class _WaveSums(torch.autograd.Function):
    """Σ_n cos(j·step·p) and Σ_n sin(j·step·p) for j = 1 … knots: p `(v n s)` → `(2 knots v s)`.

    The knots are evenly spaced, so one cosine and one sine suffice: cos((j+1)x) = 2·cos(x)·cos(jx) − cos((j−1)x), and
    the same for sines. Nothing but p is kept for the backward pass, which runs the recurrence again: at 17 knots this
    holds a thirtieth of what autograd would.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, step: float, knots: int, present: Tensor | None) -> Tensor:
        ctx.save_for_backward(p, present)
        ctx.step, ctx.knots = step, knots
        sums = p.new_empty(2, knots, p.shape[0], p.shape[2])
        for j, cos, sin in _waves(p, step, knots, present):
            torch.sum(cos, dim=1, out=sums[0, j - 1])
            torch.sum(sin, dim=1, out=sums[1, j - 1])
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        p, present = ctx.saved_tensors
        t = ctx.step * torch.arange(1, ctx.knots + 1, device=p.device)[:, None, None]
        for_cos, for_sin = (grad * t)[..., None, :]  # each (knots v 1 s)
        total = torch.zeros_like(p)
        for j, cos, sin in _waves(p, ctx.step, ctx.knots, present):
            total.addcmul_(sin, for_cos[j - 1], value=-1.0).addcmul_(cos, for_sin[j - 1])
        return total, None, None, None


def _waves(p: Tensor, step: float, knots: int, present: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(j, cos(j·step·p), sin(j·step·p)) for j = 1 … knots, zero where `present` is."""
    x = p * step
    cos_x = x.cos()
    weight = torch.ones_like(x) if present is None else present[..., None].expand_as(x)
    before, now = (weight, torch.zeros_like(x)), (weight * cos_x, weight * x.sin())
    for j in range(1, knots + 1):
        yield j, *now
        before, now = now, tuple(torch.addcmul(-old, cos_x, new, value=2.0) for old, new in zip(before, now, strict=True))
