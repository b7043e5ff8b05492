"""Weights sharded over ranks (FSDP2): apart from the model that a recipe holds, gathered to be saved, and cut again.

torch's `fully_shard` gives every rank a part of each weight, its gradient and its optimiser's state as a `DTensor`.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor of which each rank has a part."""
    # Asking by name costs no import where nothing is sharded.
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def local(value: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other as it is."""
    part: Tensor = cast(Any, value).to_local() if is_sharded(value) else value
    return part


def full_tensor(tree: Any, *, keep: bool = True, device: Any = None) -> Any:
    """A tree of dicts, lists and tensors with each sharded tensor gathered, on `device`; every rank has to ask for it.

    They are gathered one at a time, and dropped at once where a rank does not want to `keep` them.
    """
    if is_sharded(tree):
        full = tree.detach().full_tensor()
        return full.to(device) if keep else full.new_empty(0)
    if isinstance(tree, Mapping):
        return {key: full_tensor(value, keep=keep, device=device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(full_tensor(value, keep=keep, device=device) for value in tree)
    return tree


def clone_for_sharding(model: nn.Module, optimizer: Any) -> nn.Module:
    """A copy of a model to be sharded, whose parameters the optimiser now has in place of the model's own."""
    trained = copy.deepcopy(model)
    pairs = {id(own): new for own, new in zip(model.parameters(), trained.parameters(), strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [pairs[id(parameter)] for parameter in group["params"]]
    return trained


def shard_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state with each tensor cut as a model's `own` of that name is."""
    return {name: shard_like(value, own.get(name)) for name, value in state.items()}


def shard_optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole optimiser state with what has a parameter's shape cut as the parameter is."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if "optimizers" in state:
        pairs = zip(state["optimizers"], getattr(optimizer, "optimizers", ()), strict=False)
        return {**state, "optimizers": [shard_optimizer_state(one, own) for one, own in pairs]}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(map(is_sharded, parameters)) or len(parameters) < len(state["state"]):
        return state
    parts = {
        number: {name: shard_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


def shard_like(value: Any, like: Any) -> Any:
    """A whole tensor cut as `like`, which has its shape, is; anything else as it is."""
    if not (is_sharded(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the same file, so nothing has to be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


__all__ = ["clone_for_sharding", "full_tensor", "is_sharded", "local", "shard_like", "shard_optimizer_state", "shard_state"]
