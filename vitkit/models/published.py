"""Published weights for a backbone that says how their names and shapes become its own.

A backbone, or a module within it, offers a method

    def published_names(self, names: Iterable[str]) -> Sequence[tuple[str, str]]

which gets the names of a file's tensors and returns patterns of names with their replacements, as `re.sub` takes them. They are applied in
their order to every name. It may also offer

    def fit_weight(self, name: str, value: Tensor) -> tuple[Tensor, str] | None

which gets a tensor whose shape differs from that of the backbone's tensor `name`, and returns the tensor in this shape with a few words on
the change, or None.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitkit.errors import UsageError, printable

WRAPPERS = ("", "module.", "model.", "backbone.", "encoder.", "trunk.", "module.backbone.", "visual.trunk.")
"""What may stand before every name of the model in a file."""


def offering(backbone: nn.Module) -> tuple[str, Any] | None:
    """The name and the module within `backbone` that offers `published_names`; None if no module does."""
    return next(((name, module) for name, module in backbone.named_modules() if hasattr(module, "published_names")), None)


def renamed(module: Any, state: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """The names within `module` by the file's names, and the file's names that stand beside the model.

    The prefix of `WRAPPERS` is taken off that gives the most names of the module.
    """
    target = module.state_dict()
    best: dict[str, str] = {}
    for wrapper in WRAPPERS:
        inner = {name: name.removeprefix(wrapper) for name in state if name.startswith(wrapper)}
        patterns = module.published_names(list(inner.values()))
        names = {}
        for source, name in inner.items():
            for pattern, replacement in patterns:
                name = re.sub(pattern, replacement, name)
            names[source] = name
        if not best or _matches(names, target) > _matches(best, target):
            best = names
    return best, [name for name in state if name not in best]


def _matches(names: Mapping[str, str], target: Mapping[str, Tensor]) -> int:
    return sum(name in target for name in names.values())


def fitted(module: Any, name: str, value: Tensor, wanted: Tensor, channels: Any) -> tuple[Tensor | None, str]:
    """A tensor in the shape of `wanted` and a few words on the change of its values; None if it does not fit.

    `channels(value, count)` changes the channels of the first convolution.
    """
    if value.shape == wanted.shape:
        return value, ""
    if value.squeeze().shape == wanted.squeeze().shape:  # a 1×1 convolution is a linear map
        return value.reshape(wanted.shape), ""
    change = module.fit_weight(name, value) if hasattr(module, "fit_weight") else None
    if change is not None and change[0].shape == wanted.shape:
        return change
    first = next((key for key, tensor in module.state_dict().items() if tensor.ndim == 4), "")
    if name == first and value.ndim == 4 and (value.shape[0], value.shape[2:]) == (wanted.shape[0], wanted.shape[2:]):
        count = wanted.shape[1]
        return channels(value, count), "channels summed" if count == 1 else "channels repeated"
    return None, ""


def check_loaded(path: Any, loaded: list[str], unused: list[str], target: Mapping[str, Tensor]) -> None:
    """Raise `UsageError` if no weight of more than one dimension was loaded."""
    if not any(target[name].ndim > 1 for name in loaded):
        raise UsageError(
            f"no weight of {printable(path)} fits this backbone: {printable('; '.join(sorted(unused)[:3]))}; build the backbone with the "
            f"file's preset, or its widths and depths"
        )


__all__ = ["check_loaded", "fitted", "offering", "renamed"]
