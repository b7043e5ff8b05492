"""Checks of the results of modules: tokens, features, or losses by name."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitkit.contracts import Loss
from vitkit.errors import ConformanceError
from vitkit.testing.cases import Case
from vitkit.testing.modules import SAMPLES, built_module, finite, outputs


def check_tokens(case: Case) -> str:
    """Images or ids → tokens `(b n d)` with d = `embed_dim`; pooled features `(b d)`; extra tokens are accepted and returned."""
    module = built_module(case).eval()
    width = getattr(module, "embed_dim", None)
    if not isinstance(width, int):
        raise ConformanceError(f"{case} has embed_dim {width!r}; expected the number of its tokens' dimensions, a whole number")
    inputs = case.inputs(module, SAMPLES)
    with torch.no_grad():
        tokens = module(**inputs)
        _expect(case, "the call", tokens, (SAMPLES, None, width))
        results = outputs(case, module, inputs)
        finite(case, results, "in evaluation mode")
        for name in ("encode_image", "encode_label"):
            if name in results:
                _expect(case, name, results[name], (SAMPLES, results[name].shape[-1]))
        encode_text: Any = getattr(module, "encode_text", None)
        if encode_text is not None:
            text = encode_text([f"sample {number}" for number in range(SAMPLES)])
            _expect(case, "encode_text", text, (SAMPLES, text.shape[-1] if isinstance(text, Tensor) else None))
        if "extra_tokens" in inspect.signature(module.forward).parameters:
            more = module(**inputs, extra_tokens=torch.randn(SAMPLES, 2, width))
            _expect(case, "the call with 2 extra_tokens", more, (SAMPLES, tokens.shape[1] + 2, width))
    return f"{tuple(next(iter(inputs.values())).shape)} → {tuple(tokens.shape)}"


def check_features(case: Case) -> str:
    """Features `(b in_dim)` → a float tensor for each sample, `(b out_dim ...)` where there is an `out_dim`."""
    module = built_module(case).eval()
    inputs = case.inputs(module, SAMPLES)
    with torch.no_grad():
        results = outputs(case, module, inputs)
        result = module(**inputs)
    if not results:
        raise ConformanceError(f"{case} gives {type(result).__name__}; expected a floating tensor, or a dict of them")
    finite(case, results, "in evaluation mode")
    if isinstance(result, Tensor) and "out_dim" in case.kwargs:
        _expect(case, "the call", result, (SAMPLES, case.kwargs["out_dim"], *result.shape[2:]))
    for name, tensor in results.items():
        if not tensor.ndim or len(tensor) != SAMPLES:
            raise ConformanceError(f"{case}: {name} is {tuple(tensor.shape)}; expected {SAMPLES} rows for {SAMPLES} samples")
    return f"{tuple(next(iter(inputs.values())).shape)} → {', '.join(str(tuple(t.shape)) for t in results.values())}"


def check_parts(case: Case) -> str:
    """A mapping of finite scalar tensors that holds "loss"."""
    module = built_module(case)
    if not isinstance(module, Loss):
        raise ConformanceError(f"{case} is a {type(module).__name__} that is not callable; give it a forward method")
    parts = module(**case.inputs(module, SAMPLES))
    if not isinstance(parts, Mapping) or "loss" not in parts:
        given = f"a mapping of {', '.join(map(str, parts))}" if isinstance(parts, Mapping) else type(parts).__name__
        raise ConformanceError(f'{case} returns {given}; expected {{"loss": scalar, part: scalar, ...}}')
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConformanceError(f"{case}: part {name!r} is {given}; expected a scalar tensor of floats")
    finite(case, dict(parts), "in training mode")
    return ", ".join(parts)


def check_uninformed(case: Case) -> str:
    """If it offers `uninformed(batch_size)`: a finite number for parts that the loss returns."""
    module = built_module(case)
    uninformed: Any = getattr(module, "uninformed", None)
    if uninformed is None:
        return "not offered"
    values = uninformed(SAMPLES)
    if not isinstance(values, Mapping) or not all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
        raise ConformanceError(f"{case}: uninformed({SAMPLES}) is {values!r:.80}; expected finite numbers by part")
    parts = module(**case.inputs(module, SAMPLES))
    unknown = sorted(set(values) - set(parts))
    if unknown:
        raise ConformanceError(f"{case}: uninformed names {', '.join(unknown)}; expected parts of the loss: {', '.join(parts)}")
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "no part has an uninformed value"


def _expect(case: Case, what: str, result: object, shape: tuple[int | None, ...]) -> None:
    given = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    fits = isinstance(result, Tensor) and result.ndim == len(shape)
    if isinstance(result, Tensor) and fits:
        fits = all(want in (None, size) for want, size in zip(shape, result.shape, strict=True))
    if not isinstance(result, Tensor) or not fits or result.dtype != torch.float32:
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise ConformanceError(f"{case}: {what} gives {given} for {SAMPLES} samples; expected float32 ({wanted})")
