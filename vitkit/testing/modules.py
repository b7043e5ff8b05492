"""Checks that backbones, heads and losses share: gradients, precision, modes, seeds, state, small batches."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vitkit.errors import ConformanceError, UsageError
from vitkit.testing.cases import Case

SAMPLES = 3
MAX_DISTANCE = 0.1
"""Largest distance between results in bf16 and fp32, as a share of their norm: bf16 has eight bits of precision."""


def outputs(case: Case, module: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every floating tensor that a call returns, by name; for backbones also the results of their `encode_*` methods."""
    results = _flat("output", module(**inputs))
    if case.kind != "backbone":
        return results
    x = next(iter(inputs.values()))
    is_image = isinstance(x, Tensor) and x.ndim == 4
    for name in ("encode_image", "encode_latent"):
        if is_image and hasattr(module, name):
            results |= _flat(name, getattr(module, name)(x))
    if is_image and hasattr(module, "encode_label"):
        classes = int(getattr(module, "num_classes", 1))
        results |= _flat("encode_label", module.encode_label(torch.arange(len(x)) % classes))
    return results


def _flat(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for part, item in items for key, tensor in _flat(f"{name}[{part!r}]", item).items()}


def objective(case: Case, results: Mapping[str, Tensor]) -> Tensor:
    """A scalar that depends on every output: the loss, or each output weighted with fixed random numbers."""
    if case.kind == "loss":
        return results["output['loss']"]
    generator = torch.Generator().manual_seed(0)
    return sum(((t.float() * torch.randn(t.shape, generator=generator)).sum() for t in results.values()), torch.zeros(()))


def built_module(case: Case, seed: int = 0) -> nn.Module:
    """The component; `ConformanceError` if it is not a torch module."""
    module = case.build(seed)
    if not isinstance(module, nn.Module):
        raise ConformanceError(f"{case} is a {type(module).__name__}; expected an nn.Module, which can be trained and saved")
    return module


def finite(case: Case, results: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in results.items():
        if not bool(tensor.isfinite().all()):
            raise ConformanceError(
                f"{case} gives numbers in {name} that are not finite {where}; look for divisions by zero, logarithms, roots and "
                f"exponentials, and compute them in fp32: with torch.autocast(x.device.type, enabled=False)"
            )


def check_gradients(case: Case) -> str:
    """Every trained parameter gets a finite gradient, and so does an input of floats."""
    module = built_module(case).train()
    inputs = {k: _with_gradient(v) for k, v in case.inputs(module, SAMPLES).items()}
    results = outputs(case, module, inputs)
    finite(case, results, "in training mode")
    total = objective(case, results)
    if not total.requires_grad:
        raise ConformanceError(f"{case} gives a result without gradient; do not detach it or use no_grad in training mode")
    total.backward()
    trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    none = [name for name, grad in trained.items() if grad is None]
    if none:
        raise ConformanceError(
            f"{case}: no gradient reaches {_some(none)}; use them in every forward pass, or leave them out "
            f"(parameters that are not used stop training with several processes)"
        )
    given = [v.grad for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    if given and all(grad is None for grad in given):
        raise ConformanceError(f"{case}: no gradient reaches its inputs; modules before it could not be trained")
    everything = {**trained, **{f"input {i}": grad for i, grad in enumerate(given)}}
    bad = [name for name, grad in everything.items() if grad is not None and not bool(grad.isfinite().all())]
    if bad:
        raise ConformanceError(f"{case}: the gradient of {_some(bad)} is not finite; look for roots and norms at zero")
    return f"{len(trained)} parameters" if trained else "no parameters; its inputs"


def _with_gradient(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if floating else value


def check_precision(case: Case) -> str:
    """Parameters in fp32; forward and backward under bf16 autocast finite and near those in fp32."""
    module = built_module(case).eval()
    other = {name: p.dtype for name, p in module.named_parameters() if p.dtype != torch.float32}
    if other:
        name, dtype = next(iter(other.items()))
        raise ConformanceError(f"{case}: parameter {name} is {dtype}; build it in float32, the runner chooses the precision")
    inputs = case.inputs(module, SAMPLES)
    torch.manual_seed(2)
    full = outputs(case, module, inputs)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        half = outputs(case, module, {k: _with_gradient(v) for k, v in inputs.items()})
    finite(case, half, "under bf16 autocast")
    for name, tensor in full.items():
        if name not in half:
            raise ConformanceError(f"{case}: {name} is missing under bf16 autocast")
        difference, norm = (half[name].float() - tensor).detach().norm(), tensor.detach().norm()
        far = float(difference / norm.clamp(min=1e-3 * max(tensor.numel(), 1) ** 0.5))
        if far > MAX_DISTANCE:
            raise ConformanceError(
                f"{case}: {name} under bf16 autocast lies {far:.0%} from fp32's, expected at most {MAX_DISTANCE:.0%}; compute "
                f"exponentials, differences and sums over many values in fp32"
            )
    total = objective(case, half)
    if total.requires_grad:
        total.backward()
    finite(case, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, "in gradients under bf16 autocast")
    return "fp32, bf16"


def check_modes(case: Case) -> str:
    """In evaluation mode: equal results in two calls, independent of the other samples; nothing is drawn or updated."""
    module = built_module(case)
    inputs = case.inputs(module, SAMPLES)
    torch.manual_seed(2)
    module.train()
    trained = outputs(case, module, inputs)
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first, second = outputs(case, module, inputs), outputs(case, module, inputs)
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise ConformanceError(f"{case} changes {_some(changed)} in evaluation mode; update them only where self.training")
    if {n: t.shape for n, t in trained.items()} != {n: t.shape for n, t in first.items()}:
        raise ConformanceError(f"{case} gives other shapes in evaluation mode than in training mode")
    if case.kind == "loss":  # it may draw directions or negatives at each call
        return "trains, evaluates"
    if not torch.equal(torch.random.get_rng_state(), state):
        raise ConformanceError(f"{case} draws random numbers in evaluation mode; draw them only where self.training")
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            raise ConformanceError(f"{case}: {name} differs between two calls in evaluation mode")
    with torch.no_grad():
        alone = outputs(case, module, {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()})
    for name, tensor in first.items():
        if not torch.allclose(tensor[:1], alone[name][:1], rtol=1e-3, atol=1e-4):
            raise ConformanceError(
                f"{case}: {name} of a sample depends on its neighbours in evaluation mode; use running statistics there"
            )
    differs = any(not torch.equal(trained[name], first[name]) for name in first)
    return "training differs" if differs else "both are equal"


def check_determinism(case: Case) -> str:
    """Under one seed: the same parameters, the same results and the same gradients."""
    runs = []
    for _ in range(2):
        module = built_module(case, seed=5).train()
        inputs = {k: _with_gradient(v) for k, v in case.inputs(module, SAMPLES).items()}
        torch.manual_seed(6)
        results = outputs(case, module, inputs)
        objective(case, results).backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        runs.append({"parameters": dict(module.state_dict()), "results": results, "gradients": gradients})
    for group, first in runs[0].items():
        second = runs[1][group]
        differing = [name for name in first if not torch.equal(first[name], second[name])]
        if differing:
            raise ConformanceError(
                f"{case}: {group} differ between two runs under one seed ({_some(differing)}); draw from torch's global "
                f"generator, not from numpy's, random's or one of your own"
            )
    return "seeded"


def check_state(case: Case) -> str:
    """The state dict goes through safetensors into another instance, which then gives identical results."""
    module, other = built_module(case, seed=0).eval(), built_module(case, seed=1).eval()
    state = module.state_dict()
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ConformanceError(f"{case}: the state {_some(odd)} is not a tensor, and safetensors holds only tensors")
    body = to_bytes({key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()})
    try:
        other.load_state_dict(read_tensors(body), strict=True)
    except RuntimeError as error:
        raise ConformanceError(f"{case}: its state dict does not fit a second instance: {error}") from None
    inputs = case.inputs(module, SAMPLES)
    with torch.no_grad():
        torch.manual_seed(2)
        first = outputs(case, module, inputs)
        torch.manual_seed(2)
        second = outputs(case, other, inputs)
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    if differing:
        raise ConformanceError(
            f"{case}: {_some(differing)} differs after loading its state dict; drawn or learned values must be "
            f"parameters or persistent buffers"
        )
    return f"{len(state)} tensors"


def check_batches(case: Case) -> str:
    """A batch of one sample and an empty one: finite results of that many rows, or a `UsageError` with the reason."""
    module = built_module(case).eval()
    outcomes = []
    for samples in (1, 0):
        inputs = case.inputs(module, samples)
        try:
            with torch.no_grad():
                results = outputs(case, module, inputs)
        except UsageError:
            outcomes.append("refused")
            continue
        except Exception as error:
            raise ConformanceError(
                f"{case} fails with a batch of {samples}: {type(error).__name__}: {error}; give a result, or raise a "
                f"UsageError with the reason"
            ) from error
        finite(case, results, f"for a batch of {samples}")
        wrong = [name for name, tensor in results.items() if case.kind != "loss" and len(tensor) != samples]
        if wrong:
            raise ConformanceError(f"{case}: {_some(wrong)} does not have {samples} rows for a batch of {samples}")
        outcomes.append("works")
    return f"one: {outcomes[0]}, none: {outcomes[1]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
