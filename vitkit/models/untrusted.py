"""Files that come from somebody else, read within bounds."""

import json
import stat
from pathlib import Path
from typing import Any

from vitkit.errors import CheckpointError

JSON_BYTES, DEPTH = 32 * 2**20, 32
"""How long and how deeply nested a JSON file may be: far beyond any that names thousands of classes."""
AGAIN = "copy or download the whole directory again"


def read_json(path: Path) -> Any:
    """What a JSON file holds that came from somebody else: plain, at most 32 MiB long and 32 levels deep.

    Raises `CheckpointError` for any other.
    """
    try:
        size = plain_size(path)
        text = path.read_text(encoding="utf-8") if size <= JSON_BYTES else "null"
        value = json.loads(text)
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
    if _depth(value) > DEPTH:
        raise CheckpointError(f"{path} is nested more than {DEPTH} levels deep; no vitkit {path.stem} is")
    return value


def plain_size(path: Path) -> int:
    """The size of a file; a pipe or a device, which may never end, is refused."""
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a directory fails to open by itself
        raise CheckpointError(f"{path} is no plain file; {AGAIN}")
    return found.st_size


def _depth(value: Any) -> int:
    """How deeply dicts and lists are nested, counted without recursion."""
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(child, level + 1) for child in children]
    return deepest


__all__ = ["AGAIN", "JSON_BYTES", "plain_size", "read_json"]
