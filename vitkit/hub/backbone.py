"""A backbone to start from: of a saved model, or registered, with published weights or with those of a file."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from vitkit.data.preprocess import Preprocessing
from vitkit.errors import UsageError, nearest, printable
from vitkit.hub.client import is_repo, load
from vitkit.models.weights import load_weights
from vitkit.registry import backbones


@dataclass(frozen=True)
class OpenedBackbone:
    """A backbone, the preprocessing that its weights expect (None if it is not known), and a line about the source of its weights.

    `classes` are those that the saved model was trained with.
    """

    backbone: nn.Module
    preprocessing: Preprocessing | None
    origin: str
    classes: list[str] = field(default_factory=list)


def open_backbone(source: str | Path, *, weights: str | Path = "auto", **arguments: Any) -> OpenedBackbone:
    """A backbone in evaluation mode.

    `source` is the directory of a saved model, the name of a registered backbone such as `timm/vit_tiny_patch16_224`, or a Hub
    repository. A directory comes before a registered name, and a registered name before a repository. `arguments` are those of the
    registered backbone; a saved model takes none.

    `weights` of a registered backbone are "auto", the published ones, for a component with a flag `pretrained`; "none", random ones;
    or a file that `load_weights` reads. A saved model has its own. Nothing of a model or file is executed.

    Raises `UsageError` for a source that is none of the three, a saved model without a backbone, arguments or weights that do not belong
    to the source, and a component without published weights; errors of the backbone, of `vitkit.load` and of `load_weights`.
    """
    name = str(source)
    if not name.strip():
        raise UsageError("the model is empty; give a directory that a run saved into, or a registered backbone such as timm/NAME")
    if not Path(name).exists() and name in backbones:
        return _registered(name, str(weights), arguments)
    if not Path(name).exists() and not is_repo(name):
        raise UsageError(
            f"no model at {printable(name)}: it is neither a directory, nor a registered backbone{nearest(name, backbones.names()) or ';'} "
            f"registered: {', '.join(backbones.names())}"
        )
    given = [f"{key}={value}" for key, value in arguments.items()] + ([f"weights={weights}"] if str(weights) != "auto" else [])
    if given:
        raise UsageError(f"{printable(name)} is a saved model: it has its own size and weights; leave {printable(', '.join(given))} out")
    model = load(source)
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        parts = ", ".join(model.config["modules"])
        raise UsageError(f"{printable(name)} was saved without a module named 'backbone'; it has {printable(parts) or 'none'}")
    preprocessing = Preprocessing.from_json(model.preprocessing) if model.preprocessing else None
    return OpenedBackbone(backbone, preprocessing, f"the saved model {printable(name)}", model.classes)


def _registered(name: str, weights: str, arguments: dict[str, Any]) -> OpenedBackbone:
    if weights == "auto":
        factory = backbones.get(name)
        if "pretrained" not in inspect.signature(cast(Any, factory)).parameters:
            raise UsageError(
                f"{printable(name)} has no published weights; give --weights FILE, or --weights none for random weights"
            )
        arguments = {**arguments, "pretrained": True}
    elif weights != "none" and not Path(weights).is_file():
        raise UsageError(f"--weights {printable(weights)}: no such file; expected auto, none, or a file of weights")
    backbone = backbones.build(name, **arguments)
    origin = {"auto": f"the published weights of {name}", "none": f"random weights of {name}"}.get(weights, "")
    if not origin:
        report = load_weights(backbone, weights)
        kept = f", {len(report.missing)} kept at random" if report.missing else ""
        origin = f"{printable(weights)}: {len(report.loaded)} tensors of {name} loaded{kept}"
    preprocessing = getattr(backbone, "preprocessing", None)
    return OpenedBackbone(backbone.eval(), preprocessing if isinstance(preprocessing, Preprocessing) else None, origin)


__all__ = ["OpenedBackbone", "open_backbone"]
