"""Checkpoints: the state that a run resumes from, as one safetensors file with a checksum and without pickle.

`safetensors.torch.save` holds the whole file in memory beside the tensors. Here tensors are written one at a time after the
header, and reading maps the file, so neither holds everything twice.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitkit.distributed.fsdp import shard_optimizer_state, shard_state
from vitkit.errors import CheckpointError
from vitkit.files import atomic_write, safetensors_header
from vitkit.training.ema import weights_of

FORMAT = "vitkit-state-1"
UNSET = "0" * 64
"""The text in the place of the checksum while the checksum is computed."""
CHUNK_BYTES = 2**24
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """A training state as read from a file: the arguments of `save_state`, bit for bit."""

    model_state: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema_state: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    progress: dict[str, Any]

    @property
    def evaluated(self) -> dict[str, Tensor]:
        """The weights that were evaluated: the averaged weights if there are any, else the trained ones."""
        if self.ema_state is None:
            return self.model_state
        return weights_of(self.ema_state)

    def restore(self, model: nn.Module, optimizer: Any, average: Any | None, schedule: Any | None) -> None:
        """Load everything but `progress`.

        Raises `CheckpointError` for another model or optimiser, and if only one side has averaged weights or a schedule.
        """
        advice = "resume with the recipe and the arguments that the run was started with"
        parts = (("averaged weights", average, self.ema_state), ("a schedule", schedule, self.scheduler))
        for name, current, saved in parts:
            if (current is None) != (saved is None):
                owner, other = ("this run", "the checkpoint") if saved is None else ("the checkpoint", "this run")
                raise CheckpointError(f"{owner} has {name}, {other} has none; {advice}")
        expected = [set(group) for group in optimizer.param_groups]
        try:
            model.load_state_dict(shard_state(self.model_state, model.state_dict()))
            optimizer.load_state_dict(shard_optimizer_state(self.optimizer, optimizer))
            if average is not None and self.ema_state is not None:
                average.load_state_dict(self.ema_state)
            if schedule is not None and self.scheduler is not None:
                schedule.load_state_dict(self.scheduler)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint belongs to another model or optimiser: {reason:.400}; {advice}") from None
        # torch accepts the state of another optimiser here and fails only at the next step.
        groups = zip(expected, optimizer.param_groups, strict=True)
        lost = sorted({key for keys, group in groups for key in keys - set(group)})
        if lost:
            raise CheckpointError(f"the checkpoint belongs to another optimiser: it has no {', '.join(lost)}; {advice}")


def save_state(
    path: str | Path,
    *,
    model_state: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    ema_state: Mapping[str, Any] | None,
    scheduler: Mapping[str, Any] | None,
    progress: Mapping[str, Any],
) -> None:
    """Write a training state atomically.

    Every argument is a tree of dicts and lists. Its tensors become the tensors of the file, and the rest a JSON text in the metadata,
    beside a SHA-256 of the whole file. Functions in a scheduler's state are left out, because the recipe makes them again. Raises
    `RunError` if the file cannot be written, and `CheckpointError` for a value that is neither a tensor nor JSON.
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
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # the format aligns values to their size
    entries = ((name, DTYPES[tensor.dtype], tensor.shape, tensor.nbytes) for name, tensor in tensors.items())
    header = safetensors_header(entries, {"format": FORMAT, "tree": skeleton, "sha256": UNSET})
    digest = hashlib.sha256(header)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            content = _bytes_of(tensor)
            digest.update(content)
            file.write(content)
        file.seek(0)
        file.write(_with_digest(header, UNSET, digest.hexdigest()))


def load_state(path: str | Path) -> State:
    """Read a training state; raises `CheckpointError` if it is missing, cut short, changed or of another kind."""
    path = Path(path)
    advice = "delete it and start again with --overwrite, or take another checkpoint"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            header = file.read(8 + length) if length < size else b""
            metadata = json.loads(header[8:])["__metadata__"]
            version, digest, skeleton = metadata["format"], metadata["sha256"], metadata["tree"]
            if version != FORMAT:
                raise CheckpointError(f"{path} is a training state of version {version!r:.40}, expected {FORMAT!r}; {advice}")
            checksum = hashlib.sha256(_with_digest(header, digest, UNSET))
            for chunk in _chunks(file):
                checksum.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is cut short, damaged or no training state; {advice}") from None
    if checksum.hexdigest() != digest:
        raise CheckpointError(f"{path} is cut short or damaged: its checksum does not fit its {size} bytes; {advice}")
    try:
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
            read = {name: tensors.get_tensor(name).clone() for name in names}  # nothing depends on the file afterwards
        return State(**_put_together(json.loads(skeleton), read))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no training state: {error}; {advice}") from None


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _with_digest(header: bytes, old: str, new: str) -> bytes:
    """The header with another checksum; quotes within the metadata's texts are escaped, so no other place fits."""
    return header.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor replaced by its number; dicts become lists of pairs, because the keys of JSON are texts."""
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise CheckpointError(f"a training state holds no tensors of {value.dtype}; known: {', '.join(map(str, DTYPES))}")
        name = str(len(tensors))
        tensors[name] = value
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
