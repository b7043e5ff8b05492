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
from torch import Tensor, nn

from vitkit.distributed.fsdp import shard_optimizer_state, shard_state
from vitkit.errors import CheckpointError
from vitkit.files import atomic_write
from vitkit.training.ema import weights_of

FORMAT = "vitkit-state-1"
UNSET = "0" * 64
"""Stands in the place of the checksum while it is taken."""


@dataclass(frozen=True)
class State:
    """What `save_state` was given, bit for bit."""

    model_state: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema_state: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    progress: dict[str, Any]

    @property
    def evaluated(self) -> dict[str, Tensor]:
        """The weights that evaluations saw: the averaged ones, where there are any."""
        if self.ema_state is None:
            return self.model_state
        return weights_of(self.ema_state)

    def restore(self, model: nn.Module, optimizer: Any, average: Any | None, schedule: Any | None) -> None:
        """Put everything but `progress` back where it came from.

        Raises `CheckpointError` for another model, another optimiser, and where averaged weights or a schedule are on
        one side only.
        """
        way = "resume with the recipe and the arguments that the run was started with"
        parts = (("averaged weights", average, self.ema_state), ("a schedule", schedule, self.scheduler))
        for what, here, saved in parts:
            if (here is None) != (saved is None):
                with_, without = ("this run", "the checkpoint") if saved is None else ("the checkpoint", "this run")
                raise CheckpointError(f"{with_} has {what}, {without} has none; {way}")
        wanted = [set(group) for group in optimizer.param_groups]
        try:
            model.load_state_dict(shard_state(self.model_state, model.state_dict()))
            optimizer.load_state_dict(shard_optimizer_state(self.optimizer, optimizer))
            if average is not None and self.ema_state is not None:
                average.load_state_dict(self.ema_state)
            if schedule is not None and self.scheduler is not None:
                schedule.load_state_dict(self.scheduler)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint is another model's or optimiser's: {said:.400}; {way}") from None
        # torch takes another optimiser's state as it is, and fails only at the next step.
        found = zip(wanted, optimizer.param_groups, strict=True)
        lost = sorted({key for keys, group in found for key in keys - set(group)})
        if lost:
            raise CheckpointError(f"the checkpoint is another optimiser's: it has no {', '.join(lost)}; {way}")


def save_state(
    path: str | Path,
    *,
    model_state: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    ema_state: Mapping[str, Any] | None,
    scheduler: Mapping[str, Any] | None,
    progress: Mapping[str, Any],
) -> None:
    """Write a training state, whole or not at all.

    Everything is a tree of dicts and lists; its tensors become those of the file, the rest a JSON text in its metadata,
    where a SHA-256 of the whole file stands too, so that a flipped byte is noticed. Functions in a scheduler's state are
    left out: the recipe makes them anew. Raises `RunError` where the file cannot be written and `CheckpointError` for a
    value that is neither tensor nor JSON.
    """
    tree = {
        "model_state": dict(model_state),
        "optimizer": optimizer,
        "ema_state": ema_state,
        "scheduler": None if scheduler is None else {k: v for k, v in scheduler.items() if _is_plain(v)},
        "progress": progress,
    }
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(tree, tensors))
    body = save(tensors, metadata={"format": FORMAT, "tree": skeleton, "sha256": UNSET})
    digest = hashlib.sha256(body).hexdigest()
    with atomic_write(path) as temporary:
        temporary.write_bytes(_with_digest(body, UNSET, digest))


def load_state(path: str | Path) -> State:
    """Read a training state; `CheckpointError` where it is missing, cut short, changed or something else."""
    path = Path(path)
    way = "delete it and start again with --overwrite, or take another checkpoint"
    try:
        body = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        metadata = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
        version, digest, skeleton = metadata["format"], metadata["sha256"], metadata["tree"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is cut short, damaged or no training state; {way}") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} is a training state of version {version!r:.40}, expected {FORMAT!r}; {way}")
    if hashlib.sha256(_with_digest(body, digest, UNSET)).hexdigest() != digest:
        raise CheckpointError(f"{path} is cut short or damaged: its checksum does not fit its {len(body)} bytes; {way}")
    try:
        return State(**_put_together(json.loads(skeleton), load(body)))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no training state: {error}; {way}") from None


def _with_digest(body: bytes, old: str, new: str) -> bytes:
    """The file with another checksum in its header; quotes within the metadata's texts are escaped, so no other fits."""
    return body.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor replaced by its number; dicts become lists of pairs, for JSON's keys are text alone."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_take_apart(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_take_apart(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"a training state holds tensors and JSON values; given {type(value).__name__}: {value!r:.80}"
    )


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


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


__all__ = ["State", "load_state", "save_state"]
