"""The state that a training run goes on from: one safetensors file, checked when read, with no pickle in it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vitkit.errors import CheckpointError
from vitkit.files import atomic_write

FORMAT = "vitkit-state-1"
_DIGEST = 32


@dataclass(frozen=True)
class State:
    """What `save_state` was given, bit for bit."""

    model_state: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema_state: dict[str, Tensor] | None
    scheduler: dict[str, Any] | None
    progress: dict[str, Any]


def save_state(
    path: str | Path,
    *,
    model_state: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    ema_state: Mapping[str, Tensor] | None,
    scheduler: Mapping[str, Any] | None,
    progress: Mapping[str, Any],
) -> None:
    """Write a training state, whole or not at all.

    Everything is a tree of dicts and lists; its tensors go into the safetensors body, the rest into JSON metadata.
    A SHA-256 of the whole follows the file's body, so that a flipped byte is noticed. Raises `RunError` where the file
    cannot be written and `CheckpointError` for a value that is neither tensor nor JSON.
    """
    tree = {
        "model_state": dict(model_state), "optimizer": optimizer, "ema_state": ema_state,
        "scheduler": _plain_attributes(scheduler), "progress": progress,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    skeleton = _take_apart(tree, tensors)
    body = save(tensors, metadata={"format": FORMAT, "tree": json.dumps(skeleton)})
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(body)
        file.write(hashlib.sha256(body).digest())


def load_state(path: str | Path) -> State:
    """Read a training state; `CheckpointError` where it is missing, cut short, changed or something else."""
    path = Path(path)
    way = "delete it and start again with --overwrite, or take another checkpoint"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(f"{path} is cut short or damaged: its checksum does not fit its {len(content)} bytes; {way}")
    try:
        tensors = load(body)
        metadata = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")]).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no training state of this version ({FORMAT}); {way}")
        tree = _put_together(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {way}") from None
    return State(**tree)


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor replaced by its number; dicts become lists of pairs, as JSON keys are text alone."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_take_apart(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_take_apart(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"a training state holds tensors and JSON values; given {type(value).__name__}: {value!r:.80}")


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(_put_together(item, tensors) for item in content)
        return {_put_together(k, tensors): _put_together(v, tensors) for k, v in content}
    return value


def _plain_attributes(scheduler: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A scheduler's state without functions, which the recipe makes anew."""
    if scheduler is None:
        return None
    return {name: value for name, value in scheduler.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)
