"""vitkit: registries of backbones, heads, losses, datasets and evaluators, composed by plain Python recipes.

`import vitkit` does not import torch: objects that need it are imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitkit.registry import REGISTRIES, Component, Registry, Spec, backbones, datasets, evaluators, heads, losses

if TYPE_CHECKING:
    from vitkit.contracts import Scores
    from vitkit.hub.client import load
    from vitkit.models.model import Model
    from vitkit.models.weights import load_weights
    from vitkit.training.recipe import parse_arguments
    from vitkit.training.run import Run

__version__ = "0.1.0"

_LAZY = {
    "Run": "vitkit.training.run",
    "load": "vitkit.hub.client",
    "Model": "vitkit.models.model",
    "load_weights": "vitkit.models.weights",
    "Scores": "vitkit.contracts",
    "parse_arguments": "vitkit.training.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vitkit' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "REGISTRIES",
    "Component",
    "Model",
    "Registry",
    "Run",
    "Scores",
    "Spec",
    "backbones",
    "datasets",
    "evaluators",
    "heads",
    "load",
    "load_weights",
    "losses",
    "parse_arguments",
]
