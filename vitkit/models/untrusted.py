"""Reading untrusted files, with limits on work and memory.

`vitkit.component_arguments.check_architecture` checks the components that such a file names. `vitkit.models.memory_limit` limits the
memory that building them takes.
"""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vitkit.errors import CheckpointError

JSON_BYTES, JSON_VALUES, JSON_LEVELS = 32 * 2**20, 2 * 2**20, 32
"""The most bytes, values and levels of a JSON file; a file that names thousands of classes has far fewer."""
HEADER_BYTES = 16 * 2**20
"""The longest header of a safetensors file: about 100 bytes a tensor."""
AGAIN = "copy or download the whole directory again"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class TensorFile:
    """A safetensors file of `size` bytes, mapped into memory: `shapes` are the shape and dtype of each tensor, from its header.

    Raises `CheckpointError` for a file that is missing, is no safetensors file, or has another size than `size` records.
    """

    def __init__(self, path: Path, size: Any, sha256: Any, recorded_in: str) -> None:
        self.path, self.sha256, self.recorded_in = path, sha256, recorded_in
        try:
            self.size = plain_size(path)
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}; {AGAIN}") from None
        if self.size != size:
            raise CheckpointError(
                f"{path} has {self.size} bytes, its config says {size!r:.40}: cut short or foreign; {AGAIN}"
            )
        if header > min(HEADER_BYTES, self.size):
            raise CheckpointError(f"{path} is no safetensors file (a header of {header:,} bytes); {AGAIN}")
        with self.tensors() as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            self.shapes = {name: (tuple(one.get_shape()), self._dtype(name, one)) for name, one in slices.items()}

    def tensors(self) -> Any:
        """The open file, a context manager: `get_tensor(name)` reads one tensor."""
        try:
            return safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is no safetensors file ({error}); {AGAIN}") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}; {AGAIN}") from None

    def verify(self) -> None:
        """Raise `CheckpointError` if the SHA-256 of the file is not the recorded one; the file is read once, in blocks."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise CheckpointError(
                f"{self.path} is not the file that was saved: its SHA-256 differs from the one in {self.recorded_in}; {AGAIN}"
            )

    def _dtype(self, name: str, one: Any) -> torch.dtype:
        if one.get_dtype() not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has the dtype {one.get_dtype()}, which no saved model has")
        return DTYPES[one.get_dtype()]


def read_json(path: Path) -> Any:
    """The content of an untrusted JSON file: a plain file of at most 32 MiB, 2 million values and 32 levels.

    Raises `CheckpointError` for any other.
    """
    try:
        size = plain_size(path)
        text = path.read_bytes() if size <= JSON_BYTES else b"null"
        values = sum(map(text.count, (b",", b"[", b"{")))  # before it is parsed: a value takes up to 100 bytes of memory
        value = json.loads(text.decode("utf-8")) if values <= JSON_VALUES else None
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} holds no {path.name}: no model was saved there, or its run has not ended"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read; {AGAIN}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}; {AGAIN}") from None
    if size > JSON_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; a vitkit {path.stem} has at most {JSON_BYTES:,}")
    if values > JSON_VALUES:
        raise CheckpointError(f"{path} holds more than {JSON_VALUES:,} values; no vitkit {path.stem} does")
    if _depth(value) > JSON_LEVELS:
        raise CheckpointError(f"{path} is nested more than {JSON_LEVELS} levels deep; no vitkit {path.stem} is")
    return value


def plain_size(path: Path) -> int:
    """The size of a file in bytes; `CheckpointError` for a pipe or a device, which may never end."""
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # opening a directory fails by itself
        raise CheckpointError(f"{path} is no plain file; {AGAIN}")
    return status.st_size


def _depth(value: Any) -> int:
    """How deeply dicts and lists are nested, counted without recursion."""
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(child, level + 1) for child in children]
    return deepest


__all__ = ["AGAIN", "JSON_BYTES", "TensorFile", "plain_size", "read_json"]
