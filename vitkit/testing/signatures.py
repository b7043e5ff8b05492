"""Checks of a component's docstring, its Spec, and arguments that may open files or addresses."""

import inspect

from torch import nn

from vitkit.component_arguments import check_architecture, names_resource
from vitkit.errors import ArgumentsError, ConformanceError
from vitkit.testing.cases import Case

LARGEST_NUMBER = 2**20
"""Largest number that `vitkit.load` accepts for a small model."""
_LIBRARIES = ("builtins", "torch", "abc", "typing")


def check_docstring(case: Case) -> str:
    """A docstring; remarks where its first sentence, required arguments, shapes or the ranks of a loss are missing."""
    text = inspect.getdoc(case.factory) or ""
    first = text.strip().split("\n\n")[0].replace("\n", " ")
    bases = inspect.getmro(case.factory) if inspect.isclass(case.factory) else ()
    full = "\n".join([text, *(base.__doc__ or "" for base in bases if base.__module__.split(".")[0] not in _LIBRARIES)])
    if not first or first == (nn.Module.__doc__ or "").strip().split("\n")[0]:
        raise ConformanceError(f"{case} has no docstring; its first sentence is the line that `vitkit list` shows")
    if not any(mark in first for mark in ".:"):
        case.notes.append(f"the docstring of {case} begins with {first!r:.60}; `vitkit list` shows it; write a full sentence")
    signature = inspect.signature(case.factory).parameters.values()
    required = [p.name for p in signature if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unnamed = [name for name in required if name not in full]
    if unnamed:
        case.notes.append(f"the docstring of {case} does not explain its argument {', '.join(unnamed)}")
    has_shapes = "`(" in full or (case.kind == "loss" and "scalar" in full)
    if case.kind in ("backbone", "head", "loss") and not has_shapes:
        case.notes.append(f"the docstring of {case} names no shape, such as `(b d)` → `(b k)`")
    if case.kind == "loss" and "rank" not in full.lower() and "process" not in full.lower():
        case.notes.append(f"the docstring of {case} does not describe its computation across ranks")
    return f"{len(text.splitlines())} lines"


def check_spec(case: Case) -> str:
    """Built from its Spec as JSON, it is the same class with tensors of the same shapes."""
    built = case.build()
    rebuilt = case.rebuild(built)
    if type(rebuilt) is not type(built):
        raise ConformanceError(f"{case} is a {type(rebuilt).__name__} when rebuilt, was a {type(built).__name__}")
    if isinstance(built, nn.Module):
        first, second = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (built, rebuilt))
        if first != second:
            raise ConformanceError(f"{case} has other tensors when rebuilt from its arguments {case.kwargs!r:.200}")
    return ", ".join(case.kwargs) or "defaults"


def check_untrusted_arguments(case: Case) -> str:
    """For information: arguments that name weights, files or addresses, and arguments that a saved model could not be loaded with.

    The arguments in a saved model are not trusted: `vitkit.load` refuses arguments that are not architecture (see
    `vitkit.component_arguments`).
    """
    if case.kind in ("dataset", "evaluator"):
        return "never built from a saved model"
    resources = [name for name in inspect.signature(case.factory).parameters if names_resource(name)]
    if resources:
        case.notes.append(
            f"{case} takes {', '.join(resources)}: vitkit.load refuses them, because the arguments in a saved model are not trusted"
        )
    try:
        check_architecture(str(case), case.factory, case.kwargs, LARGEST_NUMBER)
    except ArgumentsError as error:
        case.notes.append(f"a model that is saved with this example cannot be loaded: {error}")
        return "not loadable"
    return f"refused on load: {', '.join(resources)}" if resources else "architecture only"
