"""Each recipe's first steps on two processes, also of accumulated batches: the loss and the gradient of one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from vitkit import Run
from vitkit.training import Accumulated, Recipe

RECIPES: dict[str, dict[str, Any]] = {
    "jepa_mnist": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "vae_mnist": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "vae_cifar10": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "clip_cifar100": {},
}
"""Arguments that make each recipe small; of digits, 21 images are a batch of 8 + 8 and one of 3 + 2."""


class Captured(Exception):
    """What a recipe gave to `run.fit`."""


class Capturing(Run):
    def fit(self, model: Any, batches: Any, **_: Any) -> Any:
        raise Captured(model, batches)


def parts(recipe: str, folder: Path) -> tuple[Any, list[list[dict[str, Tensor]]]]:
    """The recipe's model, and its first batches as two ranks get them."""
    run = Capturing(folder, device="cpu", precision="fp32")
    try:
        with pytest.raises(Captured) as caught:
            requested = {"dataset": "digits", "train_size": 21, "batch_size": 8, **RECIPES[recipe]}
            loaded = Recipe(Path(__file__).parents[2] / "recipes" / f"{recipe}.py")
            loaded.run(run, {name: flag.default for name, flag in loaded.flags.items() if name not in loaded.preset_flags} | requested)
    finally:
        run.close()
    model, batches = caught.value.args
    batches = replace(batches, drop_last=False)
    ranks = [list(batches.epoch(0, seed=0, rank=rank, world=2)) for rank in range(2)]
    sizes = [[len(batch["labels"]) for batch in rank] for rank in ranks]
    assert sizes in ([[8, 3], [8, 2]], [[8, 2], [8, 2]])  # shuffled images are divided equally, and one is left out
    return model, ranks


def steps(model: Any, batches: list[dict[str, Tensor]], *, rank: int, world: int) -> list[Any]:
    """Loss, parts and gradient of each batch, and at last of all together, with a step of plain descent between them."""
    found = []
    together = Accumulated(model)
    for index, group in enumerate([*([batch] for batch in batches), batches]):
        seeds = [1000 * index + 100 * number + rank for number in range(len(group))]  # as the loop does, each rank differently
        model.zero_grad()
        losses = together(group, seeds)
        losses["loss"].backward()
        gradient = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                if world > 1:  # as DDP averages
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= world
                gradient[name] = parameter.grad.clone()
                parameter.data.add_(parameter.grad, alpha=-0.1)
        found.append(({name: value.detach() for name, value in losses.items()}, gradient))
    return found


def _worker(number: int, folder: str, recipe: str) -> None:
    torch.set_num_threads(1)
    model, ranks = parts(recipe, Path(folder) / f"run{number}")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.save(steps(model, ranks[number], rank=number, world=2), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_take_the_steps_of_one(recipe: str, tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path), recipe), nprocs=2)
    model, ranks = parts(recipe, tmp_path / "run")
    together = [{name: torch.cat([one[name], two[name]]) for name in one} for one, two in zip(*ranks, strict=True)]
    expected = steps(model, together, rank=0, world=1)
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
