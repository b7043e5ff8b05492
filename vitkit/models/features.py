"""Features of images: of a batch, or of a split, computed once for all evaluators."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError, VitkitError


@dataclass(frozen=True)
class Features:
    """Features float32 `(n d)` of one split, and its labels int64 `(n,)`."""

    features: Tensor
    labels: Tensor


def encode_image(backbone: Any, images: Tensor) -> Tensor:
    """Pooled features `(b d)` of images `(b c h w)`: `backbone.encode_image`, or the mean over its tokens `(b n d)`.

    Raises `UsageError` for a result of another shape.
    """
    pooled = getattr(backbone, "encode_image", None)
    output = (backbone if pooled is None else pooled)(images)
    axes = 3 if pooled is None else 2
    # An export traces .shape[0] as a variable, and len() as a constant.
    if not isinstance(output, Tensor) or output.ndim != axes or output.shape[0] != images.shape[0]:
        expected = f"tokens ({len(images)}, n, d)" if pooled is None else f"encode_image to give ({len(images)}, d)"
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"{type(backbone).__name__} gave {given} for {len(images)} images; expected {expected}")
    return output.mean(dim=1) if pooled is None else output


def device_of(model: Any) -> torch.device:
    """The device of a model's first parameter; the CPU for a model without parameters."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


@contextmanager
def evaluating(model: Any) -> Iterator[torch.device]:
    """Yield the model's device, with the model in evaluation mode and without gradients.

    The mode of every module and the random state are restored afterwards.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    device = device_of(model)
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            yield device
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Cached:
    """Features, with the model and the split that they belong to: while both are referenced, no other object has their `id`."""

    model: Any
    split: Any
    features: Features


_cache: ContextVar[dict[Any, _Cached] | None] = ContextVar("feature cache", default=None)


@contextmanager
def feature_cache() -> Iterator[None]:
    """Within this block `extract_features` computes a model's features of a split once, for any number of evaluators.

        with feature_cache():
            epoch.log(*(evaluator(model, data) for evaluator in evaluators))

    Features are computed again under another precision, and after the model's weights have changed. They stay in memory until
    the block ends: 4·n·d bytes for n images and d features. A block within a block uses the cache of the outermost.
    """
    if _cache.get() is not None:
        yield
        return
    token = _cache.set({})
    try:
        yield
    finally:
        _cache.reset(token)


def extract_features(
    model: Any, split: Any, *, batch_size: int = 500, size: int | None = None, seed: int = 0
) -> Features:
    """The pooled features of every image of a split, in the split's order, on every rank.

    With `size` they are the features of `size` images, chosen by `seed`, with the classes in equal shares as far as possible.
    Features come from `encode_image`. Under autocast they are computed in its precision; they are returned in float32. Within
    `feature_cache()` they are computed once. Images need no labels. Raises `UsageError` for an empty split and for a model that
    returns another shape, and `VitkitError` for features that are not finite.
    """
    cache = _cache.get()
    if cache is None:
        return _extract(model, split, batch_size, size, seed)
    weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    # The version of a tensor counts writes into it. Tensors made in inference mode have no version.
    state = tuple((id(tensor), None if tensor.is_inference() else tensor._version) for tensor in weights)
    device = weights[0].device.type if weights else "cpu"
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    key = (id(model), id(split), batch_size, size, None if size is None else seed, state, precision)
    if key not in cache:
        cache[key] = _Cached(model, split, _extract(model, split, batch_size, size, seed))
    return cache[key].features


def _extract(model: Any, split: Any, batch_size: int, size: int | None, seed: int) -> Features:
    if size is not None:
        split = split.stratified_subset(size, seed=seed)
    if len(split) == 0:
        raise UsageError("the split to evaluate on holds no images; choose another split or dataset")
    features, labels = [], []
    with evaluating(model) as device:
        for batch in split.batches(batch_size).epoch(0, device=device, rank=rank(), world=world_size()):
            # Ranks hold consecutive parts of each batch, so gathering batch by batch keeps the split's order.
            features.append(all_gather(_encode(model, batch["images"])))
            labels.append(all_gather(batch["labels"]))
    joined, targets = torch.cat(features), torch.cat(labels)
    if not bool(joined.isfinite().all()):
        raise VitkitError("the model's features are not finite: it has diverged, or its weights are damaged")
    return Features(joined.clone(), targets.clone())  # a clone is no inference tensor, so that a probe can train on it


def _encode(model: Any, images: Tensor) -> Tensor:
    count = len(images)
    if count == 0:  # this rank has no image of the last batch; one image of zeros gives the number of features
        images = images.new_zeros(1, *images.shape[1:])
    return encode_image(model, images)[:count].float()


__all__ = ["Features", "device_of", "encode_image", "evaluating", "extract_features", "feature_cache"]
