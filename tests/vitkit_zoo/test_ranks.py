"""The zoo's backbones with their weights sharded by FSDP2 over two processes: the gradients of one process with the whole batch."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from vitkit import backbones
from vitkit.testing import find

NAMES = ("cct", "convnext", "mobilevit", "pvt", "swin")


class Objective(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone.encode_image(x).square().mean()


def make(name: str) -> Objective:
    torch.manual_seed(0)
    (case,) = find(f"vitkit:{name}", kind="backbone")
    noise = {"attn_dropout": 0.0, "drop_path": 0.0} if name == "cct" else {}
    return Objective(backbones.build(name, **{**case.kwargs, **noise})).train()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    gradients_of = {}
    for name in NAMES:
        sharded = make(name)
        x = torch.randn(4, 3, *sharded.backbone.img_size, generator=torch.Generator().manual_seed(1))
        fully_shard(sharded)
        sharded(x[2 * rank : 2 * rank + 2]).backward()
        gradients = {key: parameter.grad.full_tensor() for key, parameter in sharded.named_parameters()}
        if rank:
            continue
        gradients_of[name] = {key: value.tolist() for key, value in gradients.items()}
    if not rank:
        (Path(folder) / "gradients.json").write_text(json.dumps(gradients_of))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list]]:
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return json.loads((folder / "gradients.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_backbone_has_the_gradients_of_one_process(name: str, sharded: dict[str, dict[str, list]]) -> None:
    """Batch norm included: its statistics are those of all ranks."""
    model = make(name)
    model(torch.randn(4, 3, *model.backbone.img_size, generator=torch.Generator().manual_seed(1))).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(torch.tensor(sharded[name][key]), parameter.grad, rtol=1e-3, atol=1e-5 * largest)
