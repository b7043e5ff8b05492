"""Checks of evaluators."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn

from vitkit.contracts import MetricKind, Scores, SplitName
from vitkit.data.dataset import ImageDataset
from vitkit.errors import ConformanceError, UsageError
from vitkit.testing.cases import Case, small_dataset

VAL_PREFIX = "val_"


def check_scores(case: Case) -> str:
    """`Scores` of the test split: finite floats, each with a valid protocol."""
    scores = evaluate(case.build(), case.inputs(case.build(), 8))
    _check_scores(case, scores, "test")
    return ", ".join(scores)


def check_val_split(case: Case) -> str:
    """On the validation split: the same metrics under names that begin with `val_`, which do not depend on the test split."""
    evaluator = case.build()
    inputs = case.inputs(evaluator, 8)
    dataset = inputs.get("dataset") or small_dataset()
    try:
        scores = evaluate(evaluator, inputs, "val")
    except TypeError as error:
        raise ConformanceError(
            f"{case} cannot be called with split='val' ({error}); an evaluator is called as evaluator(model, dataset, split='test')"
        ) from error
    _check_scores(case, scores, "val")
    wrong = [name for name in scores if not name.startswith(VAL_PREFIX)]
    if wrong:
        raise ConformanceError(
            f"{case}: on the validation split {wrong[0]} does not begin with {VAL_PREFIX!r}; return scores.prefixed({VAL_PREFIX!r})"
        )
    on_test = {f"{VAL_PREFIX}{name}" for name in evaluate(evaluator, inputs)}
    if set(scores) != on_test:
        names = ", ".join(sorted(set(scores) ^ on_test))
        raise ConformanceError(f"{case}: the metrics of the two splits differ in {names}; measure the same on both")
    if not isinstance(dataset, ImageDataset):
        return "its own dataset"
    fewer = replace(dataset, test=dataset.test.subset(torch.arange(1)))
    if dict(evaluate(evaluator, {**inputs, "dataset": fewer}, "val")) != dict(scores):
        raise ConformanceError(
            f"{case}: scores of the validation split depend on test images; a selection by them would use the test set. "
            f"Read getattr(dataset, split)"
        )
    return ", ".join(scores)


def _check_scores(case: Case, scores: Any, split: SplitName) -> None:
    if not isinstance(scores, Scores) or not scores:
        raise ConformanceError(f"{case} returns {type(scores).__name__} {scores!r:.60}; expected vitkit.Scores with a number")
    for name, value in scores.items():
        if not math.isfinite(value):
            raise ConformanceError(f"{case}: {name} is {value}; expected a finite number")
        protocol = scores.protocols.get(name)
        if protocol is None or not protocol.split or protocol.samples < 1:
            raise ConformanceError(
                f"{case}: {name} has no protocol; state its split and samples: protocols={{{name!r}: Measurement(...)}}"
            )
        if protocol.split != split:
            raise ConformanceError(f"{case}: the protocol of {name} has split {protocol.split!r}; expected {split!r}")
        if protocol.kind not in get_args(MetricKind):
            raise ConformanceError(f"{case}: {name} has kind {protocol.kind!r}; expected {', '.join(map(repr, get_args(MetricKind)))}")
        if protocol.direction not in ("max", "min"):
            raise ConformanceError(f"{case}: {name} has direction {protocol.direction!r}; expected 'max' or 'min'")
        if protocol.kind == "proportion":
            for prefix, number in (("", value), ("the chance level of ", protocol.chance), ("the untrained value of ", protocol.untrained)):
                if number is not None and not 0.0 <= number <= 1.0:
                    raise ConformanceError(f"{case}: {prefix}{name} is {number:g}; expected a proportion in [0, 1], or kind 'score'")
        if protocol.kind == "error" and value < 0:
            raise ConformanceError(f"{case}: {name} is {value:g}; expected an error of at least 0, or kind 'score'")
    extra = sorted(scores.protocols.keys() - scores.keys())
    if extra:
        raise ConformanceError(f"{case}: protocols for {', '.join(extra)}, which it does not return")


def check_leaves_the_model(case: Case) -> str:
    """The model's mode, parameters, buffers and gradients and the random state stay as they were; a second call gives equal scores."""
    evaluator = case.build()
    inputs = case.inputs(evaluator, 8)
    model = inputs["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    first = evaluate(evaluator, inputs)
    if not torch.equal(torch.random.get_rng_state(), state):
        raise ConformanceError(f"{case} moves the random state; wrap it in torch.random.fork_rng()")
    if [module.training for module in model.modules()] != modes:
        raise ConformanceError(f"{case} leaves the model in another mode; restore every module's .training")
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    if changed or any(parameter.grad is not None for parameter in model.parameters()):
        raise ConformanceError(f"{case} changes the model ({', '.join(changed[:4]) or 'gradients'}); evaluate under torch.inference_mode()")
    if dict(first) != dict(evaluate(evaluator, inputs)):
        raise ConformanceError(f"{case} gives other numbers the second time; draw from a separate generator, seeded by an argument")
    return "mode, state, gradients, seed"


def check_evaluator_precision(case: Case) -> str:
    """Scores are finite under bf16 autocast too."""
    evaluator = case.build()
    inputs = case.inputs(evaluator, 8)
    with torch.autocast("cpu", torch.bfloat16):
        scores = evaluate(evaluator, inputs)
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if bad:
        raise ConformanceError(f"{case}: {', '.join(bad)} is not finite under bf16 autocast; compute scores in fp32")
    return "fp32, bf16"


def check_small_datasets(case: Case) -> str:
    """A test split of one image and of none: scores, or a `UsageError` with the reason."""
    evaluator = case.build()
    outcomes = []
    for size in (1, 0):
        inputs = case.inputs(evaluator, 8)
        dataset = inputs.get("dataset") or small_dataset()
        if not isinstance(dataset, ImageDataset):
            return "its own dataset"
        inputs["dataset"] = replace(dataset, test=dataset.test.subset(torch.arange(size)))
        try:
            evaluate(evaluator, inputs)
            outcomes.append("works")
        except UsageError:
            outcomes.append("refused")
        except Exception as error:
            raise ConformanceError(
                f"{case} fails with {size} test images: {type(error).__name__}: {error}; raise a UsageError with the reason"
            ) from error
    return f"one: {outcomes[0]}, none: {outcomes[1]}"


def evaluate(evaluator: Any, inputs: Mapping[str, Any], split: SplitName | None = None) -> Any:
    """Call an evaluator with its inputs, on its default split where none is given."""
    rest = dict(inputs)
    model: nn.Module = rest.pop("model")
    dataset = rest.pop("dataset", None) or small_dataset()
    return evaluator(model, dataset, **rest, **({} if split is None else {"split": split}))
