"""Losses and evaluators on two processes, compared with one process that has all samples."""

import json
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitkit.data.dataset import ImageDataset
from vitkit.errors import ConformanceError
from vitkit.registry import REGISTRIES
from vitkit.testing.cases import Case, make_case, small_dataset

SIZES = (5, 3)
"""Samples of each process, eight in all: with different counts a mean of means differs from the mean."""
SOLUTION = (
    "statistics of the batch go through vitkit.distributed: a mean over it is all_reduce_sum(sum) / all_reduce_sum(count), "
    "other ranks' samples come by all_gather, and random draws for all ranks by broadcast"
)


def check_ranks(case: Case) -> str:
    """Two gloo processes with parts of the batch give the loss and, by DDP's mean, the gradient of one process with all of it."""
    if not torch.distributed.is_available():
        return "torch was built without distributed processes"
    module = case.build()
    inputs, bigger = case.inputs(module, sum(SIZES)), case.inputs(module, sum(SIZES) + 1)
    tensors, others = _split(inputs)
    axes = {name: _axis(value, bigger[name]) for name, value in inputs.items()}
    if tensors and all(axis is None for axis in axes.values()):
        raise ConformanceError(f"{case}: no input grows with the number of samples; see vitkit_example in vitkit/contracts.py")
    expected = _measure(case, {**tensors, **others})
    with tempfile.TemporaryDirectory(prefix="vitkit-ranks-") as folder:
        _write(tensors, Path(folder) / "inputs.safetensors")
        _start(case, _worker, folder, _portable(case), others, axes)
        results = [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(len(SIZES))]
    for name, value in expected.items():
        parts = [result[name] for result in results]
        if name.startswith("input "):  # each process's rows, whose mean over processes is a share of them
            axis = axes[name.removeprefix("input ")]
            parts = [torch.cat(parts, dim=axis) / len(SIZES) if axis is not None else torch.stack(parts).mean(dim=0)]
        elif name.startswith("parameter "):
            parts = [torch.stack(parts).mean(dim=0)]
        for part in parts:
            if not torch.allclose(part, value, rtol=1e-5, atol=1e-5):
                gap = float((part - value).abs().max())
                quantity = name if name.startswith("part ") else f"the gradient of {name}"
                raise ConformanceError(f"{case}: {quantity} in two processes is off by {gap:.3g} from one process's; {SOLUTION}")
    return f"{' + '.join(map(str, SIZES))} samples"


TEST_IMAGES = 11
"""Test images of the check: two processes get six and five of them."""


def check_evaluator_ranks(case: Case) -> str:
    """Two gloo processes return the scores of one, each test image counted once."""
    if not torch.distributed.is_available():
        return "torch was built without distributed processes"
    if case.inputs(case.build(), 8).keys() - {"model", "dataset"}:
        return "takes other inputs"
    expected = _scores(case)
    with tempfile.TemporaryDirectory(prefix="vitkit-ranks-") as folder:
        _start(case, _evaluate, folder, _portable(case))
        for rank in range(len(SIZES)):
            scores = json.loads((Path(folder) / f"{rank}.json").read_text())
            for name, (value, samples) in expected.items():
                other = scores.get(name, (None, 0))
                if other[0] is None or not math.isclose(other[0], value, rel_tol=1e-5, abs_tol=1e-5) or other[1] != samples:
                    raise ConformanceError(
                        f"{case}: {name} of {samples} samples is {value:g} in one process, and of {other[1]} samples {other[0]} on "
                        f"rank {rank} of two; encode this rank's share of the images and all_gather it, see vitkit.distributed"
                    )
    return f"{TEST_IMAGES} test images"


def _scores(case: Case) -> dict[str, tuple[float, int]]:
    """Each score with the number of samples that it says it was measured on."""
    evaluator = case.build()
    inputs = case.inputs(evaluator, 8)
    dataset = inputs.get("dataset") or small_dataset()
    if isinstance(dataset, ImageDataset):
        dataset = replace(dataset, test=dataset.test.subset(torch.arange(len(dataset.test))[:TEST_IMAGES]))
    scores = evaluator(inputs["model"].train(), dataset)
    return {name: (float(value), scores.protocols[name].samples) for name, value in scores.items()}


def _evaluate(rank: int, folder: str, portable: tuple[Any, ...]) -> None:
    with _process_group(rank, folder):
        (Path(folder) / f"{rank}.json").write_text(json.dumps(_scores(_unpacked(portable))), encoding="utf-8")


def _start(case: Case, worker: Any, *arguments: Any) -> None:
    """Run `worker(rank, *arguments)` in two processes; `ConformanceError` if one fails."""
    try:
        torch.multiprocessing.start_processes(worker, arguments, nprocs=len(SIZES), start_method=_start_method(case.kind))
    except Exception as error:
        if "freeze_support" in str(error):
            raise ConformanceError(
                f"{case}: other processes import this script too; put its code under if __name__ == '__main__':"
            ) from None
        raise ConformanceError(f"{case} fails in two processes: {str(error).strip().splitlines()[-1]}; {SOLUTION}") from error


def _axis(value: Any, bigger: Any) -> int | None:
    """The dimension along which samples lie: the one that is longer for more samples."""
    if not isinstance(value, Tensor):
        return None
    return next((i for i, (a, b) in enumerate(zip(value.shape, bigger.shape, strict=True)) if a != b), None)


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in inputs.items() if name not in tensors}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    # Each by itself: parts of a loss may be one tensor under two names, which safetensors refuses.
    save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, path)


def _portable(case: Case) -> tuple[Any, ...]:
    """The values from which another process builds the case; a registered name is built by its name there."""
    return (case.kind, case.name, case.factory, case.kwargs, case.distribution)


def _unpacked(portable: tuple[Any, ...]) -> Case:
    kind, name, factory, kwargs, distribution = portable
    return make_case(kind, name, factory, kwargs, distribution) if kind == "evaluator" else Case(*portable)


def _measure(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The loss's parts, and the gradients of its inputs and parameters."""
    module: nn.Module = case.build().train()
    given = {k: _leaf(v) for k, v in inputs.items()}
    torch.manual_seed(40 + (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0))
    parts = module(**given)
    parts["loss"].backward()
    measured = {f"part {name}": value.detach().float() for name, value in parts.items()}
    measured |= {f"input {k}": v.grad for k, v in given.items() if isinstance(v, Tensor) and v.grad is not None}
    return measured | {f"parameter {k}": p.grad for k, p in module.named_parameters() if p.grad is not None}


def _leaf(value: Any) -> Any:
    return value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _worker(rank: int, folder: str, portable: tuple[Any, ...], others: dict[str, Any], axes: dict[str, int | None]) -> None:
    with _process_group(rank, folder):
        tensors = load_file(Path(folder) / "inputs.safetensors")
        share = {
            name: value if axes[name] is None else value.split(SIZES, dim=axes[name])[rank]
            for name, value in tensors.items()
        }
        measured = _measure(_unpacked(portable), {**share, **others})
        _write(measured, Path(folder) / f"{rank}.safetensors")


@contextmanager
def _process_group(rank: int, folder: str) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(SIZES))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _start_method(kind: str) -> str:
    """A server that has imported torch and the plugins once, and forks; processes that start from nothing on Windows."""
    if sys.platform == "win32":
        return "spawn"
    imported = {entry.value.partition(":")[0] for entry in REGISTRIES[kind].entries()} & sys.modules.keys()
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *sorted(imported)])
    return "forkserver"
