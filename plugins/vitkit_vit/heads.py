"""Plain heads on pooled features: a linear map and a multi-layer perceptron."""

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from vitkit.distributed import BatchNorm
from vitkit.validation import at_least, one_of


class LinearHead(nn.Module):
    """A linear map of features `(b in_dim)` → `(b out_dim)`, after a layer norm if `norm` is true.

    Weights are drawn from Normal(0, 0.02), biases are zero. Raises `UsageError` for dimensions below one.
    """

    def __init__(self, in_dim: int, out_dim: int, norm: bool = True) -> None:
        super().__init__()
        at_least(1, in_dim=in_dim, out_dim=out_dim)
        self.norm = nn.LayerNorm(in_dim) if norm else nn.Identity()
        self.linear = nn.Linear(in_dim, out_dim)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def output_weights(self) -> set[str]:
        """Names of the last layer's weights, which are not orthogonalised."""
        return {"linear.weight"}

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


class MLPHead(nn.Module):
    """`depth` linear layers with a norm and GELU between them: features `(b in_dim)` → `(b out_dim)`.

    Hidden layers are `hidden` wide (None: `in_dim`). `norm` is "layer", "none" or "batch", over every leading
    dimension and over the batches of all ranks. Weights are drawn as torch's `nn.Linear` draws them. Raises `UsageError` for
    dimensions or a depth below one and for another norm.
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
        at_least(1, in_dim=in_dim, out_dim=out_dim, hidden=hidden, depth=depth)
        norms = {"layer": nn.LayerNorm, "batch": BatchNorm, "none": nn.Identity}
        one_of(norms, norm=norm)
        self.layers = nn.Sequential()
        for width, following in pairwise([in_dim, *[hidden] * (depth - 1)]):
            self.layers.extend([nn.Linear(width, following), norms[norm](following), nn.GELU()])
        self.layers.append(nn.Linear(in_dim if depth == 1 else hidden, out_dim))

    def output_weights(self) -> set[str]:
        """Names of the last layer's weights, which are not orthogonalised."""
        return {f"layers.{len(self.layers) - 1}.weight"}

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
