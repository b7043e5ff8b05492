"""Arguments of components: whether they fit a factory's signature, and whether they are architecture.

A saved model is not trusted. While it is loaded, a component takes only arguments that describe its architecture:

- numbers, flags, None, and lists of these;
- strings that the parameter's annotation lists in a `Literal`;
- values that the component declares in its attribute `vitkit_architecture`, a dict of rules by the argument's name. It is the only way
  to allow other strings, dicts, and names that `**kwargs` takes.

A rule is a regular expression, which each string of the value matches as a whole; or an annotation, such as `int`,
`float | None` or `Literal["avg", "max"]`; or a dict of rules for a dict's values, by patterns of its keys. The rule of the name
"**" holds for every other name that `**kwargs` takes:

    class Encoder(nn.Module):
        vitkit_architecture = {"vocabulary": r"[a-z]+", "weights": {r"[a-z]+": float}, "**": int | None}

        def __init__(self, vocabulary: list[str], weights: dict[str, float], **kwargs: int | None) -> None: ...

No rule allows a string with a slash or a backslash, nor a flag such as `pretrained=True`: loading opens no path and no address.

`inspect.signature(...).bind` finds wrong names but cannot suggest the nearest one, and pydantic, which is no dependency of
vitkit, would convert values where a typo should be refused: `fits` compares plain JSON values with annotations in 20 lines.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitkit.errors import ArgumentsError, nearest

MAX_STRING_CHARACTERS = 200
IDENTIFIER = r"\w[\w.+-]*"
"""The allowed names of a family's member, if the family declares no rule."""
_REMOTE = re.compile(r"pretrained|download|remote")
_FILE = re.compile(r"(^|_)(path|paths|file|files|filename|dir|directory|folder|root|url|uri|repo|repo_id|cache|fd)$")


def names_resource(name: str) -> bool:
    """Whether an argument, by its name, takes weights, a file or an address, which a saved model must not set."""
    return bool(_REMOTE.search(name) or _FILE.search(name))


def signature_of(name: str, factory: Callable[..., Any]) -> str:
    """`name(in_dim: int, hidden: int = 512)`, as messages and `vitkit show` print it."""
    try:
        signature = _signature(factory)
    except (TypeError, ValueError):
        return f"{name}(...)"
    return f"{name}{signature.replace(return_annotation=inspect.Signature.empty)}"


def check_arguments(what: str, factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `ArgumentsError` if keyword arguments do not fit a signature, by name or by plain type."""
    try:
        signature = _signature(factory)
    except (TypeError, ValueError):
        return
    text = signature_of(what.split("'")[1] if "'" in what else what, factory)
    names = _keywords(signature)
    for name in kwargs:
        if name not in names and not _takes_any(signature):
            raise ArgumentsError(f"{what} takes no argument {name!r:.80}{nearest(name, names)}; its signature: {text}")
    for name in names:
        if signature.parameters[name].default is inspect.Parameter.empty and name not in kwargs:
            raise ArgumentsError(f"{what} needs the argument {name!r}; its signature: {text}")
    hints = _hints(factory)
    for name, value in kwargs.items():
        if name in hints and not fits(value, hints[name]):
            raise ArgumentsError(
                f"{what}: {name} is {value!r:.80}, expected {_type_name(hints[name])}; its signature: {text}"
            )


def check_architecture(what: str, factory: Callable[..., Any], kwargs: Mapping[str, Any], largest: int) -> None:
    """Raise `ArgumentsError` for an argument that is no architecture, as the module describes it.

    Numbers are finite and at most `largest` in size; so is the count of values of one component.
    """
    family = factory.func if isinstance(factory, partial) else factory
    declared: Mapping[str, Any] = getattr(family, "vitkit_architecture", {})
    try:
        signature = inspect.signature(family)
        names = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    except (TypeError, ValueError):
        names = []
    hints = _hints(factory)
    if isinstance(factory, partial):
        for name, value in zip(names, factory.args, strict=False):
            _check_value(what, name, value, declared.get(name, IDENTIFIER), largest)
    left = largest
    for name, value in kwargs.items():
        left -= sum(1 for _ in _values(value))
        if left < 0:
            raise ArgumentsError(f"{what}: its arguments hold more than {largest:,} values; a saved model has fewer")
        if not (name in declared or name in names or "**" in declared):
            raise ArgumentsError(
                f"{what}: {name!r:.80} is not declared as architecture, so a saved model must not set it; the component's author "
                f"can name it in vitkit_architecture"
            )
        numeric = name in declared or (name in names and _is_numeric(hints.get(name)))
        is_remote = _REMOTE.search(name) and value not in (None, False)
        if is_remote or (_FILE.search(name) and value is not None and not numeric):
            raise ArgumentsError(
                f"{what}: {name} is {value!r:.80}; a saved model must not name weights, files or addresses: loading reads only "
                f"the model's own files"
            )
        rule = hints.get(name) if name in names else declared.get("**")
        _check_value(what, name, value, declared.get(name, rule), largest)


def _check_value(what: str, name: str, value: Any, rule: Any, largest: int) -> None:
    is_annotation = not isinstance(rule, str | Mapping)
    problem = f"expected {_type_name(rule)}" if is_annotation and not fits(value, rule) else _problem(value, rule, largest)
    if problem:
        raise ArgumentsError(f"{what}: {name} is {value!r:.80}; {problem}")


def _problem(value: Any, rule: Any, largest: int) -> str:
    """The reason why a value is no architecture, or an empty string."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, int | float):
        within = math.isfinite(value) and abs(value) <= largest
        return "" if within else f"expected a finite number of at most {largest:,}, given the size of the saved weights"
    if isinstance(value, str):
        if len(value) > MAX_STRING_CHARACTERS:
            return f"expected at most {MAX_STRING_CHARACTERS} characters"
        matches = isinstance(rule, str) and re.fullmatch(rule, value) and not re.search(r"[/\\]|\.\.", value)
        return "" if matches or value in _literals(rule) else (
            "a saved model gives a component only its architecture: numbers, flags, lists of these, and strings that its "
            "signature lists in a Literal or its vitkit_architecture declares"
        )  # fmt: skip
    if isinstance(value, list | tuple):
        return next(filter(None, (_problem(item, rule, largest) for item in value)), "")
    if isinstance(value, dict) and isinstance(rule, Mapping):
        for key, item in value.items():
            inner = next((inner for pattern, inner in rule.items() if re.fullmatch(pattern, str(key))), None)
            if inner is None:
                return f"its key {key!r:.80} is not declared as architecture; expected {', '.join(rule)}"
            if not isinstance(inner, str | Mapping) and not fits(item, inner):
                return f"{key} is {item!r:.80}, expected {_type_name(inner)}"
            problem = _problem(item, inner, largest)
            if problem:
                return problem
        return ""
    return "expected numbers, flags, lists of these, or what the component's vitkit_architecture declares"


def _values(value: Any) -> Iterator[Any]:
    """Every value in lists and dicts, each container too."""
    pending = [value]
    while pending:
        item = pending.pop()
        yield item
        pending += list(item.values()) if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()


def _literals(annotation: Any) -> tuple[Any, ...]:
    """The choices of every `Literal` in an annotation."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for argument in get_args(annotation) for choice in _literals(argument))


def _is_numeric(annotation: Any) -> bool:
    """Whether an annotation allows only numbers, flags and None."""
    arguments = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all(argument in (int, float, bool, NoneType) for argument in arguments)


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """A factory's signature; a class that inherits torch's `Module.__init__(*args, **kwargs)` takes no arguments."""
    classes = inspect.getmro(factory) if inspect.isclass(factory) else ()
    first = next((c for c in classes if "__init__" in vars(c)), None)  # the class, because libraries replace torch's own method
    if first is not None and (first.__module__, first.__qualname__) == ("torch.nn.modules.module", "Module"):
        return inspect.Signature()
    return inspect.signature(factory)


def _keywords(signature: inspect.Signature) -> list[str]:
    return [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    factory = factory.func if isinstance(factory, partial) else factory
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return get_type_hints(target)
    except Exception:  # a hint that only a type checker can resolve checks nothing here
        return {}


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain JSON value fits an annotation; annotations of other types accept every value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple, Sequence) and arguments:
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(item, arguments[1]) for item in value.values())
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is None or annotation is NoneType:
        return value is None
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return True


__all__ = ["check_architecture", "check_arguments", "fits", "signature_of"]
