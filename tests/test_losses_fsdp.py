"""Every registered loss with its weights sharded by FSDP2 over two processes: the step of one process with the whole batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from vitkit.registry import REGISTRIES
from vitkit.testing import Case, find

NAMES = sorted(entry.name for entry in REGISTRIES["loss"].entries() if entry.distribution == "vitkit")
SIZES = (5, 3)


class Objective(nn.Module):
    """A loss of inputs that are multiplied by a learned number each, so that every loss has a weight to train."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        scaled = {name: _scaled(value, self.scale.mean()) for name, value in inputs.items()}
        total: Tensor = self.loss(**scaled)["loss"]
        return total


def _scaled(value: Any, scale: Tensor) -> Any:
    if isinstance(value, dict):
        return {name: _scaled(part, scale) for name, part in value.items()}
    return value * scale if value.is_floating_point() else value


def _case(name: str) -> Case:
    (case,) = find(f"vitkit:{name}", kind="loss")
    return case


def _share(case: Case, rank: int) -> dict[str, Any]:
    """A rank's rows of the inputs for eight samples: of each tensor, those along the dimension that grows with their number."""
    loss = case.build()
    inputs, more = case.inputs(loss, sum(SIZES)), case.inputs(loss, sum(SIZES) + 1)
    share = {}
    for name, value in inputs.items():
        grown = [] if isinstance(value, dict) else [i for i, n in enumerate(value.shape) if n != more[name].shape[i]]
        share[name] = value.split(SIZES, dim=grown[0])[rank] if grown else value
    return share


def _stepped(model: Any, case: Case, inputs: dict[str, Any], seed: int) -> list[Any]:
    """The loss before and after a step of plain descent, and the weights after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(2):
        torch.manual_seed(seed)  # ranks draw differently; what is drawn for all comes from rank 0
        loss = model(inputs)
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).flatten().tolist()
        for name, value in model.state_dict().items()
    }
    return [values, weights]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name in NAMES:
        case = _case(name)
        model = Objective(case.build().train())
        fully_shard(model)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        results[name] = _stepped(model, case, _share(case, rank), 40 + rank)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_loss_takes_the_steps_of_one_process(name: str, sharded: list[dict[str, Any]]) -> None:
    case = _case(name)
    model = Objective(case.build().train())
    values, weights = _stepped(model, case, case.inputs(model.loss, sum(SIZES)), 40)
    for found_values, found_weights in (result[name] for result in sharded):
        assert found_values == pytest.approx(values, rel=1e-4, abs=1e-5)
        assert found_weights.keys() == weights.keys()
        for key, value in weights.items():
            assert found_weights[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_no_loss_has_a_parameter_of_0_dimensions(name: str) -> None:
    assert all(parameter.ndim > 0 for parameter in _case(name).build().parameters())
