"""Every registered loss over several batches, on one process and on two: that of the whole batch, and its gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit import losses
from vitkit.testing import find
from vitkit.testing.cases import Case
from vitkit.training import Accumulated, GradCacheable

NAMES = sorted(entry.name for entry in losses.entries() if entry.distribution == "vitkit")
WITHOUT_SAMPLES = {"multitask"}  # it adds up what others have made of the samples
SIZES = (5, 4, 3)
COUNT = sum(SIZES)


def case_of(name: str) -> Case:
    (case,) = find(name, kind="loss")
    return case


class Weighed(GradCacheable):
    """A loss of inputs times weights: samples stand first in what is embedded, wherever the loss wants them."""

    def __init__(self, case: Case, axes: dict[str, int], inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.loss, self.axes = case.build().train(), axes
        torch.manual_seed(4)
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(1 + 0.1 * torch.rand_like(value[0])) for name, value in inputs.items() if value.is_floating_point()}
        )

    def forward_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * self.weights[name] if name in self.weights else value for name, value in batch.items()}

    def compute_loss(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(3)  # what is drawn for the whole batch: SIGReg's directions
        return dict(self.loss(**{name: value.movedim(0, self.axes[name]) for name, value in embedded.items()}))


def example(name: str) -> tuple[Weighed, dict[str, Tensor]]:
    """The loss and its inputs, samples first."""
    case = case_of(name)
    built = case.build()
    inputs, more = case.inputs(built, COUNT), case.inputs(built, COUNT + 1)
    axes = {
        key: next(i for i, (a, b) in enumerate(zip(value.shape, more[key].shape, strict=True)) if a != b)
        for key, value in inputs.items()
    }
    first = {key: value.movedim(axes[key], 0).contiguous() for key, value in inputs.items()}
    return Weighed(case, axes, first), first


def parts(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    split = {key: value.split(SIZES) for key, value in inputs.items()}
    return [{key: values[number] for key, values in split.items()} for number in range(len(SIZES))]


def measured(model: nn.Module, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found["loss"].backward()
    gradient = {name.removeprefix("module.").removeprefix("model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}, gradient


def accumulated(name: str, number: int | None = None) -> Any:
    model, inputs = example(name)
    called: nn.Module = Accumulated(model)
    batches = parts(inputs)
    if number is not None:  # each batch's first samples here, its others there: 3 + 2, 2 + 2, 2 + 1
        batches = [{key: value.tensor_split(2)[number] for key, value in batch.items()} for batch in batches]
        called = nn.parallel.DistributedDataParallel(called, find_unused_parameters=True)
    return measured(called, called(batches, [7, 8, 9]))


def _worker(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.save({name: accumulated(name, number) for name in NAMES if name not in WITHOUT_SAMPLES}, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_SAMPLES])
def test_three_batches_are_one(name: str, two_ranks: list[dict[str, Any]]) -> None:
    model, inputs = example(name)
    expected = measured(model, model(inputs))
    assert all(bool(gradient.abs().sum() > 0) for gradient in expected[1].values())
    for found in (accumulated(name), *(rank[name] for rank in two_ranks)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_loss_is_left_out() -> None:
    for name in WITHOUT_SAMPLES:
        case = case_of(name)
        assert not any(isinstance(value, Tensor) for value in case.inputs(case.build(), COUNT).values())
