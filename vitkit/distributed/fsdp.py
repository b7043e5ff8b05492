"""Weights sharded over ranks (FSDP2): cloned from the recipe's model, gathered for saving, and sharded again for resuming.

torch's `fully_shard` gives every rank a part of each weight, its gradient and its optimiser state as a `DTensor`.
`torch.distributed.checkpoint.state_dict` does the same for torch's optimisers, but not for an optimiser that chains several.
`vitkit.training.accelerator` switches FSDP2 on.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn


def is_sharded(value: Any) -> bool:
    """True for a tensor of which each rank has a part."""
    # Testing the attribute avoids an import if nothing is sharded.
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def local(value: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor unchanged."""
    part: Tensor = cast(Any, value).to_local() if is_sharded(value) else value
    return part


def full_tensor(tree: Any, *, keep: bool = True, device: Any = None) -> Any:
    """A tree of dicts, lists and tensors with each sharded tensor gathered, on `device`; every rank has to call it.

    Tensors are gathered one at a time; a rank that does not `keep` them drops each at once.
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
    """A copy of a model to be sharded; the optimiser then holds the parameters of the copy instead of the model's."""
    trained = copy.deepcopy(model)
    pairs = {id(old): new for old, new in zip(model.parameters(), trained.parameters(), strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [pairs[id(parameter)] for parameter in group["params"]]
    return trained


def shard_state(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A full state with each tensor sharded as the tensor of that name in `like`."""
    return {name: shard_like(value, like.get(name)) for name, value in state.items()}


def shard_optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A full optimiser state with each tensor that has the shape of its parameter sharded as that parameter."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if "optimizers" in state:
        pairs = zip(state["optimizers"], getattr(optimizer, "optimizers", ()), strict=False)
        return {**state, "optimizers": [shard_optimizer_state(part, inner) for part, inner in pairs]}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(map(is_sharded, parameters)) or len(parameters) < len(state["state"]):
        return state
    parts = {
        number: {name: shard_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


def shard_like(value: Any, like: Any) -> Any:
    """A full tensor sharded as `like`, which has its shape; anything else unchanged."""
    if not (is_sharded(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the same file, so nothing has to be communicated.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


__all__ = ["clone_for_sharding", "full_tensor", "is_sharded", "local", "shard_like", "shard_optimizer_state", "shard_state"]
