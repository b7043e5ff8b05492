"""Flags of `vitkit run FILE`: the Python types that can be one, and their values as plain JSON."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vitkit.errors import RecipeError, UsageError

SCALARS = (int, float, bool, str, Path)
SUPPORTED = "int, float, bool, str, Path, Literal, Enum, list of these, or one of these or None"


@dataclass(frozen=True)
class Flag:
    """One flag: its type, its default value and its help.

    `default` is `inspect.Parameter.empty` for a flag that must be given. `default_text` is shown in place of the default.
    """

    annotation: Any
    default: Any = inspect.Parameter.empty
    help: str = ""
    metavar: str | None = None
    default_text: str | None = None


def split_annotation(annotation: Any) -> tuple[Any, str]:
    """`Annotated[int, "blocks"]` → `(int, "blocks")`; any other annotation with an empty text."""
    if get_origin(annotation) is not Annotated:
        return annotation, ""
    hint, *extra = get_args(annotation)
    return hint, next((item for item in extra if isinstance(item, str)), "")


def can_be_flag(annotation: Any) -> bool:
    """True for the types that `SUPPORTED` names."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return can_be_flag(arguments[0])
    if origin in (Union, UnionType):
        rest = [argument for argument in arguments if argument is not NoneType]
        return len(rest) == 1 and len(arguments) == 2 and can_be_flag(rest[0])
    if origin is list:
        return len(arguments) == 1 and _is_scalar(arguments[0])
    return _is_scalar(annotation)


def _is_scalar(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(value, str) for value in get_args(annotation))
    return annotation in SCALARS or (inspect.isclass(annotation) and issubclass(annotation, Enum))


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Parse a component's arguments: `["hidden=512", "norm=batch"]` → `{"hidden": 512, "norm": "batch"}`.

    A value is read as JSON (`512`, `1e-3`, `true`, `null`, `[2, 4]`, `"512"`); a value that is not JSON is text. Raises
    `UsageError` for a word without `=`, a name that is not an identifier, and a name that is given twice.
    """
    arguments: dict[str, Any] = {}
    for word in given:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"an argument is NAME=VALUE, for example hidden=512; given {word!r}")
        if name in arguments:
            raise UsageError(f"the argument {name!r} is given twice: {arguments[name]!r} and {text!r}; leave one out")
        try:
            arguments[name] = json.loads(text, parse_constant=_refuse_constant)
        except ValueError:
            arguments[name] = text
    return arguments


def _refuse_constant(word: str) -> Any:
    raise ValueError(word)  # NaN and Infinity are not JSON and could not be saved


def plain(value: Any) -> Any:
    """The value of a flag as plain JSON: a path as text, an enumeration as its value."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def typed(annotation: Any, value: Any) -> Any:
    """The inverse of `plain`: a recorded value in the type of its flag; `RecipeError` if it does not fit."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if value is None:
        return None
    if origin is Annotated:
        return typed(arguments[0], value)
    if origin in (Union, UnionType):
        return typed(next(argument for argument in arguments if argument is not NoneType), value)
    if origin is list and isinstance(value, list):
        return [typed(arguments[0], item) for item in value]
    if inspect.isclass(annotation) and issubclass(annotation, Path | Enum):
        try:
            return annotation(value)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"the recorded value {value!r:.80} is not a {annotation.__name__}: {error}") from None
    return value


__all__ = ["SUPPORTED", "Flag", "can_be_flag", "parse_arguments", "plain", "split_annotation", "typed"]
