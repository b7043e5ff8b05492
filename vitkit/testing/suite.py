"""The checks of each kind, and functions that run them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vitkit.errors import ConformanceError, UsageError, VitkitError, nearest
from vitkit.testing import data, evaluators, modules, ranks, shapes, signatures
from vitkit.testing.cases import Case, make_case

Check = Callable[[Case], str]

_MODULES: dict[str, Check] = {
    "gradients": modules.check_gradients,
    "precision": modules.check_precision,
    "modes": modules.check_modes,
    "determinism": modules.check_determinism,
    "state": modules.check_state,
    "batches": modules.check_batches,
}
_ALL: dict[str, Check] = {
    "docstring": signatures.check_docstring,
    "spec": signatures.check_spec,
    "arguments": signatures.check_untrusted_arguments,
}
CHECKS: dict[str, dict[str, Check]] = {
    "backbone": {"shapes": shapes.check_tokens, **_MODULES, **_ALL},
    "head": {"shapes": shapes.check_features, **_MODULES, **_ALL},
    "loss": {
        "shapes": shapes.check_parts,
        **_MODULES,
        "ranks": ranks.check_ranks,
        "uninformed": shapes.check_uninformed,
        **_ALL,
    },
    "dataset": {
        "fields": data.check_dataset_fields,
        "splits": data.check_splits,
        "batches": data.check_dataset_batches,
        "determinism": data.check_dataset_determinism,
        **_ALL,
    },
    "evaluator": {
        "scores": evaluators.check_scores,
        "val": evaluators.check_val_split,
        "model": evaluators.check_leaves_the_model,
        "precision": evaluators.check_evaluator_precision,
        "batches": evaluators.check_small_datasets,
        "ranks": ranks.check_evaluator_ranks,
        **_ALL,
    },
}
"""The checks of each kind by name. A check takes a `Case` and returns a line on the result, or raises `ConformanceError`."""


@dataclass(frozen=True)
class Result:
    """One check of one component: `seen` describes the result, `problem` is empty if it passed, `notes` are remarks for the author."""

    case: Case
    check: str
    seen: str
    problem: str = ""
    notes: tuple[str, ...] = ()


def examine(case: Case, names: Iterable[str] | None = None) -> list[Result]:
    """Run a case's checks, or only the named ones, and return their results; torch's random state stays as it was."""
    checks = CHECKS[case.kind]
    results = []
    for name in checks if names is None else names:
        if name not in checks:
            raise UsageError(f"no check named {name!r} for a {case.kind}{nearest(name, checks) or ';'} known: {', '.join(checks)}")
        case.notes.clear()
        try:
            with torch.random.fork_rng(devices=[]):
                seen = checks[name](case)
            results.append(Result(case, name, seen, notes=tuple(case.notes)))
        except ConformanceError as error:
            results.append(Result(case, name, "", str(error)))
        except Exception as error:  # a component may raise anything
            message = str(error) if isinstance(error, VitkitError) else f"{type(error).__name__}: {error}"
            rule = (checks[name].__doc__ or "").strip()
            results.append(Result(case, name, "", f"{case}, built with {case.kwargs!r:.200}: {message} (checked: {rule})"))
    return results


def _check(kind: str, factory: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    case = make_case(kind, getattr(factory, "__name__", kind), factory, kwargs)
    problems = [f"[{result.check}] {result.problem}" for result in examine(case) if result.problem]
    if problems:
        raise ConformanceError("\n".join(problems))


def check_backbone(factory: Callable[..., Any], **kwargs: Any) -> None:
    """Check a backbone's factory, built with `kwargs`; `ConformanceError` with a line for each failed check."""
    _check("backbone", factory, kwargs)


def check_head(factory: Callable[..., Any], **kwargs: Any) -> None:
    """Check a head's factory, built with `kwargs`; `ConformanceError` with a line for each failed check."""
    _check("head", factory, kwargs)


def check_loss(factory: Callable[..., Any], **kwargs: Any) -> None:
    """Check a loss's factory, built with `kwargs`; `ConformanceError` with a line for each failed check."""
    _check("loss", factory, kwargs)


def check_dataset(factory: Callable[..., Any], **kwargs: Any) -> None:
    """Check a dataset's factory, built with `kwargs`; `ConformanceError` with a line for each failed check."""
    _check("dataset", factory, kwargs)


def check_evaluator(factory: Callable[..., Any], **kwargs: Any) -> None:
    """Check an evaluator's factory, built with `kwargs`; `ConformanceError` with a line for each failed check."""
    _check("evaluator", factory, kwargs)
