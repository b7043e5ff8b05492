"""A recipe: a Python file whose `main(run, ...)` signature is its configuration.

The typed keyword arguments of `main` with their defaults are the flags of `vitkit run FILE`, its docstring is
their help, and a text in `Annotated[int, "blocks in the encoder"]` is a flag's own line.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from vitkit.errors import RecipeError, UsageError

SCALARS = (int, float, bool, str, Path)
SUPPORTED = "int, float, bool, str, Path, Literal, Enum, list of these, or one of these or None"


class Recipe:
    """A recipe file, read and checked: its path, its `main` and the flags that `main` takes.

    Raises `RecipeError` where the file is missing, does not run, has no `main`, or `main` has an argument that
    cannot be a flag.
    """

    def __init__(self, path: str | Path, *, reserved: frozenset[str] = frozenset(), name: str = "") -> None:
        self.path = Path(path)
        self.name = name or self.path.stem
        """What its runs are kept under: the file's name without `.py`, unless a copy goes by another."""
        self.main = _load_main(self.path)
        self.flags = _flags(self.path, self.main, reserved)

    @property
    def help(self) -> str:
        """The docstring of `main`, or else of the file."""
        module = sys.modules.get(self.main.__module__)
        parts = [inspect.getdoc(module) if module else None, inspect.getdoc(self.main)]
        return "\n\n".join(part for part in parts if part)


def _load_main(path: Path) -> Callable[..., Any]:
    if path.is_dir():
        raise RecipeError(f"{path} is a directory; give the recipe's .py file{_beside(path)}")
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}{_beside(path.parent)}")
    if path.suffix != ".py":
        raise RecipeError(f"{path} is no Python file; a recipe is a .py file with a main(run, ...)")
    name = f"vitkit_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, enums and string annotations look their module up
    sys.path.insert(0, str(path.parent.resolve()))  # a recipe may import a file beside it, as a script may
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise RecipeError(
            f"{error.filename or path}:{error.lineno}: syntax error: {error.msg}: {(error.text or '').strip()}"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a recipe may raise anything, SystemExit too
        raise RecipeError(
            f"{path} cannot be read: {type(error).__name__}: {error}; `vitkit --debug run` shows where"
        ) from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    main = getattr(module, "main", None)
    if not inspect.isfunction(main):
        raise RecipeError(f"{path} defines no function main(run, ...); a recipe's main is what `vitkit run` calls")
    return main


def _beside(folder: Path) -> str:
    files = sorted(str(file) for file in folder.glob("*.py")) if folder.is_dir() else []
    files = files or sorted(str(file) for file in Path("recipes").glob("*.py"))
    return f"; there are {', '.join(files[:12])}" if files else ""


def _flags(path: Path, main: Callable[..., Any], reserved: frozenset[str]) -> dict[str, inspect.Parameter]:
    """The parameters of `main` after `run`, with resolved annotations."""
    parameters = list(inspect.signature(main).parameters.values())
    where = f"main in {path}"
    if not parameters or parameters[0].name != "run":
        raise RecipeError(f"{where} takes {parameters[0].name if parameters else 'nothing'!r} first; expected `run`")
    try:
        hints = get_type_hints(main, include_extras=True)
    except NameError as error:
        raise RecipeError(f"{where} has an annotation that cannot be resolved: {error}") from None
    flags = {}
    for parameter in parameters[1:]:
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise RecipeError(f"{where}: {parameter} cannot be a flag; give each argument a name, type and default")
        if name in reserved:
            raise RecipeError(f"{where}: --{name.replace('_', '-')} belongs to every run already; rename {name!r}")
        if name not in hints:
            raise RecipeError(f"{where}: argument {name!r} has no type; write e.g. {name}: int = 1 ({SUPPORTED})")
        if not _is_supported(hints[name]):
            raise RecipeError(
                f"{where}: argument {name!r} has the type {inspect.formatannotation(hints[name])}, "
                f"which cannot be a flag; use {SUPPORTED}"
            )
        flags[name] = parameter.replace(annotation=hints[name])
    return flags


def _is_supported(annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_supported(arguments[0])
    if origin in (Union, UnionType):
        rest = [argument for argument in arguments if argument is not NoneType]
        return len(rest) == 1 and len(arguments) == 2 and _is_supported(rest[0])
    if origin is list:
        return len(arguments) == 1 and _is_scalar(arguments[0])
    return _is_scalar(annotation)


def _is_scalar(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(value, str) for value in get_args(annotation))
    return annotation in SCALARS or (inspect.isclass(annotation) and issubclass(annotation, Enum))


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """`["hidden=512", "norm=batch"]` → `{"hidden": 512, "norm": "batch"}`: what a flag says of a component's arguments.

    A value is read as JSON (`512`, `1e-3`, `true`, `null`, `[2, 4]`, `"512"`) and else taken as text. Raises `UsageError`
    for a word without `=`, a name that is none and a name given twice.
    """
    arguments: dict[str, Any] = {}
    for word in given:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"an argument is NAME=VALUE, for example hidden=512; given {word!r}")
        if name in arguments:
            raise UsageError(f"the argument {name!r} is given twice: {arguments[name]!r} and {text!r}; leave one out")
        try:
            arguments[name] = json.loads(text, parse_constant=_no_number)
        except ValueError:
            arguments[name] = text
    return arguments


def _no_number(word: str) -> Any:
    raise ValueError(word)  # NaN and Infinity are no JSON, and could not be saved


def plain(value: Any) -> Any:
    """A flag's value as plain JSON: paths as text, enumerations by their value."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def typed(annotation: Any, value: Any) -> Any:
    """The inverse of `plain`: a recorded value in the type that a flag is annotated with; `RecipeError` where it has none."""
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
            raise RecipeError(f"the recorded value {value!r:.80} is no {annotation.__name__}: {error}") from None
    return value
