"""Heads that map pooled features to what a task needs."""

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from vitkit.distributed import BatchNorm
from vitkit.errors import UsageError


class LinearHead(nn.Module):
    """A linear map of features `(b in_dim)` → `(b out_dim)`, behind a layer norm unless `norm` is false.

    Weights are drawn from Normal(0, 0.02), biases are zero. Raises `UsageError` for dimensions below one.
    """

    def __init__(self, in_dim: int, out_dim: int, norm: bool = True) -> None:
        super().__init__()
        _check_dims(in_dim=in_dim, out_dim=out_dim)
        self.norm = nn.LayerNorm(in_dim) if norm else nn.Identity()
        self.linear = nn.Linear(in_dim, out_dim)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


class MLPHead(nn.Module):
    """`depth` linear layers with a norm and GELU between them: features `(b in_dim)` → `(b out_dim)`.

    Hidden layers are `hidden` wide (None: `in_dim`). `norm` is "layer", "none" or "batch", over every leading
    dimension and, under several processes, over all of theirs. Weights are drawn as torch's `nn.Linear` draws them. Raises `UsageError`
    for dimensions or a depth below one and for another norm.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: int | None = None,
        depth: int = 2,
        norm: Literal["layer", "batch", "none"] = "layer",
    ) -> None:
        super().__init__()
        hidden = in_dim if hidden is None else hidden
        _check_dims(in_dim=in_dim, out_dim=out_dim, hidden=hidden, depth=depth)
        norms = {"layer": nn.LayerNorm, "batch": BatchNorm, "none": nn.Identity}
        if norm not in norms:
            raise UsageError(f"norm is {norm!r}, expected one of {', '.join(map(repr, norms))}")
        self.layers = nn.Sequential()
        for width, following in pairwise([in_dim, *[hidden] * (depth - 1)]):
            self.layers.extend([nn.Linear(width, following), norms[norm](following), nn.GELU()])
        self.layers.append(nn.Linear(in_dim if depth == 1 else hidden, out_dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.flatten(0, -2)).unflatten(0, features.shape[:-1])


def _check_dims(**dims: int) -> None:
    for name, value in dims.items():
        if value < 1:
            raise UsageError(f"{name} is {value}, expected a whole number of at least 1")
