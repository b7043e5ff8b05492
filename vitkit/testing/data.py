"""What datasets and evaluators must do."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.contracts import Batches, Dataset, Scores
from vitkit.data.dataset import ImageDataset
from vitkit.errors import ConformanceError, UsageError
from vitkit.testing.cases import Case, small_dataset

BATCH = 4


def check_dataset_fields(case: Case) -> str:
    """Name, classes, shape, mean, std, source, licence and two splits, each what the contract says."""
    found = case.build()
    missing = [name for name in Dataset.__annotations__ if not hasattr(found, name)]
    if missing:
        raise ConformanceError(f"{case} has no {', '.join(missing)}; vitkit.data.dataset.from_store builds a whole dataset from tensors")
    if not isinstance(found.classes, list) or not all(isinstance(name, str) for name in found.classes):
        raise ConformanceError(f"{case}: classes are {found.classes!r:.80}; expected a list of names")
    shape = tuple(found.shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ConformanceError(f"{case}: shape is {found.shape!r:.40}; expected (channels, height, width)")
    for name in ("mean", "std"):
        values = tuple(getattr(found, name))
        if len(values) != shape[0] or not all(0.0 <= value <= 1.0 for value in values):
            raise ConformanceError(f"{case}: {name} is {values!r:.80}; expected {shape[0]} numbers in [0, 1], one a channel")
    for name in ("name", "source", "licence"):
        if not isinstance(getattr(found, name), str) or not getattr(found, name):
            raise ConformanceError(f"{case}: {name} is {getattr(found, name)!r:.40}; expected a text that tells a person")
    return f"{len(found.classes)} classes of {'×'.join(map(str, shape))}"


def check_splits(case: Case) -> str:
    """Images uint8 `(n c h w)`, labels int64 `(n,)` that name classes, training images at least."""
    found = case.build()
    for name in ("train", "test"):
        split = getattr(found, name)
        images, labels = split.images, split.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConformanceError(f"{case}: {name}.images is {images.dtype} {tuple(images.shape)}; expected uint8 (n c h w)")
        if labels.dtype != torch.int64 or labels.ndim != 1 or len(labels) != len(split):
            raise ConformanceError(f"{case}: {name}.labels is {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(split)},)")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(found.classes):
            raise ConformanceError(f"{case}: {name}.labels name other classes than 0 … {len(found.classes) - 1}")
    if not len(found.train):
        raise ConformanceError(f"{case} holds no training images")
    return f"{len(found.train):,} + {len(found.test):,}"


def check_dataset_batches(case: Case) -> str:
    """Batches of `images`, float32 `(b c h w)` of the dataset's shape, and `labels`, int64 `(b,)`; a batch of one too."""
    found = case.build()
    for size in (BATCH, 1):
        batches = _batches(case, found, size)
        batch = next(iter(batches.epoch(0)))
        if not isinstance(batch, Mapping) or not {"images", "labels"} <= batch.keys():
            raise ConformanceError(f"{case}: a batch is {batch!r:.60}; expected a dict with images and labels")
        images, labels, count = batch["images"], batch["labels"], min(size, len(found.train))
        if images.dtype != torch.float32 or tuple(images.shape) != (count, *found.shape):
            raise ConformanceError(
                f"{case}: a batch's images are {images.dtype} {tuple(images.shape)}; expected float32 {(count, *found.shape)}"
            )
        if labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
            raise ConformanceError(f"{case}: a batch's labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({count},)")
        if not bool(images.isfinite().all()):
            raise ConformanceError(f"{case}: a batch holds numbers that are not finite; is a channel's std zero?")
    return f"of {BATCH} and of one"


def check_dataset_determinism(case: Case) -> str:
    """The same epoch, seed and index give the same batch, `start` skips, and two ranks share one process's batches."""
    batches = _batches(case, case.build(), BATCH)
    first, again = _head(batches, 3), _head(_batches(case, case.build(), BATCH), 3)
    if not all(torch.equal(a["images"], b["images"]) for a, b in zip(first, again, strict=True)):
        raise ConformanceError(f"{case}: one epoch's batches differ under one seed; draw from a generator seeded by both")
    if len(first) > 1 and not torch.equal(_head(batches, 1, start=1)[0]["images"], first[1]["images"]):
        raise ConformanceError(f"{case}: epoch(0, start=1) does not begin with the second batch; a run could not be resumed")
    halves = [_head(_batches(case, case.build(), BATCH // 2), 1, rank=rank, world=2)[0]["labels"] for rank in range(2)]
    if not torch.equal(torch.cat(halves).sort().values, first[0]["labels"].sort().values):
        raise ConformanceError(f"{case}: two ranks' first batches are not the two halves of one process's")
    return f"{len(first)} batches, 2 ranks"


def _batches(case: Case, found: Any, size: int) -> Batches:
    try:
        batches = found.train.batches(size, shuffle=True)
    except (AttributeError, TypeError) as error:
        raise ConformanceError(
            f"{case}: train.batches({size}, shuffle=True) fails: {error}; vitkit.data.dataset.from_store gives splits that have it"
        ) from None
    if not isinstance(batches, Batches):
        raise ConformanceError(f"{case}: train.batches gives a {type(batches).__name__} without a length or epoch(number)")
    return batches


def _head(batches: Batches, count: int, **options: Any) -> list[dict[str, Tensor]]:
    found = []
    for batch in batches.epoch(0, seed=3, **options):
        found.append(batch)
        if len(found) == count:
            break
    return found


def check_scores(case: Case) -> str:
    """`Scores`: finite floats, each with the protocol that it was measured by."""
    scores = _evaluate(case, case.build())
    if not isinstance(scores, Scores) or not scores:
        raise ConformanceError(f"{case} returns {type(scores).__name__} {scores!r:.60}; expected vitkit.Scores with a number")
    for name, value in scores.items():
        if not -float("inf") < value < float("inf"):
            raise ConformanceError(f"{case}: {name} is {value}; expected a finite number")
        protocol = scores.protocols.get(name)
        if protocol is None or not protocol.split or protocol.samples < 1:
            raise ConformanceError(f"{case}: {name} has no protocol; say its split and samples: protocols={{{name!r}: Measurement(...)}}")
    foreign = sorted(scores.protocols.keys() - scores.keys())
    if foreign:
        raise ConformanceError(f"{case}: protocols for {', '.join(foreign)}, which it does not return")
    return ", ".join(scores)


def check_leaves_the_model(case: Case) -> str:
    """The model's mode, parameters, buffers and gradients and the random state are as they were; so is the next answer."""
    evaluator = case.build()
    inputs = case.inputs(evaluator, 8)
    model = inputs["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    first = _call(evaluator, inputs)
    if not torch.equal(torch.random.get_rng_state(), state):
        raise ConformanceError(f"{case} moves the random state; wrap it in torch.random.fork_rng()")
    if [module.training for module in model.modules()] != modes:
        raise ConformanceError(f"{case} leaves the model in another mode; put every module's .training back")
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    if changed or any(parameter.grad is not None for parameter in model.parameters()):
        raise ConformanceError(f"{case} changes the model ({', '.join(changed[:4]) or 'gradients'}); evaluate under torch.inference_mode()")
    if dict(first) != dict(_call(evaluator, inputs)):
        raise ConformanceError(f"{case} gives other numbers the second time; draw from a generator of its own, seeded by an argument")
    return "mode, state, gradients, seed"


def check_evaluator_precision(case: Case) -> str:
    """Under bf16 autocast it still gives finite numbers."""
    evaluator = case.build()
    inputs = case.inputs(evaluator, 8)
    with torch.autocast("cpu", torch.bfloat16):
        scores = _call(evaluator, inputs)
    bad = [name for name, value in scores.items() if not -float("inf") < value < float("inf")]
    if bad:
        raise ConformanceError(f"{case}: {', '.join(bad)} is not finite under bf16 autocast; compute scores in fp32")
    return "fp32, bf16"


def check_small_datasets(case: Case) -> str:
    """A test split of one image and one of none: numbers, or a `UsageError` that says why not."""
    evaluator = case.build()
    said = []
    for size in (1, 0):
        inputs = case.inputs(evaluator, 8)
        dataset = inputs.get("dataset") or small_dataset()
        if not isinstance(dataset, ImageDataset):
            return "its own dataset"
        inputs["dataset"] = replace(dataset, test=dataset.test.subset(torch.arange(size)))
        try:
            _call(evaluator, inputs)
            said.append("works")
        except UsageError:
            said.append("refused")
        except Exception as error:
            raise ConformanceError(
                f"{case} fails with {size} test images: {type(error).__name__}: {error}; raise a UsageError that says what it needs"
            ) from error
    return f"one: {said[0]}, none: {said[1]}"


def _evaluate(case: Case, evaluator: Any) -> Any:
    return _call(evaluator, case.inputs(evaluator, 8))


def _call(evaluator: Any, inputs: Mapping[str, Any]) -> Any:
    rest = dict(inputs)
    model: nn.Module = rest.pop("model")
    return evaluator(model, rest.pop("dataset", None) or small_dataset(), **rest)
