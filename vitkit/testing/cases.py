"""Components to check, each with a small example."""

import atexit
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitkit.component_arguments import check_arguments
from vitkit.data.dataset import ImageDataset, from_store
from vitkit.data.store import Stored
from vitkit.errors import ConformanceError, UnknownNameError, UsageError, nearest
from vitkit.registry import ADDED, REGISTRIES, Spec, canonical

USUAL_ARGUMENTS: dict[str, Any] = {
    "in_dim": 16, "out_dim": 4, "num_classes": 3, "in_chans": 3, "img_size": 32, "vocab_size": 32, "context_length": 8,
}  # fmt: skip
"""Small values for required arguments by their usual names; `root` is a folder of made-up images."""


@dataclass(frozen=True)
class Case:
    """A component of a kind with the arguments that it is built with; `name` is its name in messages.

    A registered component is built through its registry, a bare factory by calling it. `store` is the dataset store that it is
    built with, by default the user's. A check adds remarks to `notes`.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    kwargs: dict[str, Any]
    distribution: str = ""
    draw: Callable[[int], dict[str, Any]] | None = field(default=None, compare=False)
    store: Path | None = None
    notes: list[str] = field(default_factory=list, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"

    def build(self, seed: int = 0) -> Any:
        """Build it with torch's generator at `seed`."""
        torch.manual_seed(seed)
        with _store(self.store):
            if not self.distribution:
                check_arguments(str(self), self.factory, self.kwargs)
                return self.factory(**self.kwargs)
            name = self.name if self.distribution == ADDED else f"{self.distribution}:{self.name}"
            return REGISTRIES[self.kind].build(name, **self.kwargs)

    def rebuild(self, built: Any, seed: int = 0) -> Any:
        """Build it from the record of a saved model: the Spec as JSON, or a bare factory's arguments."""
        torch.manual_seed(seed)
        with _store(self.store):
            if not self.distribution:
                return self.factory(**json.loads(json.dumps(self.kwargs)))
            return Spec.from_json(json.loads(json.dumps(built.spec.to_json()))).build()

    def inputs(self, built: Any, samples: int, seed: int = 1) -> dict[str, Any]:
        """The arguments of a call by name: `samples` samples drawn at `seed`."""
        torch.manual_seed(seed)
        declared = self.draw(samples) if self.draw is not None else {}
        if declared:
            return declared
        if self.kind == "loss":
            raise ConformanceError(
                f"{self} does not declare its inputs; give its class a static method "
                f"vitkit_example(samples) -> (arguments, inputs), see vitkit/contracts.py"
            )
        if self.kind == "evaluator":
            return {"model": small_model(), "dataset": small_dataset()}
        first = next(iter(inspect.signature(built.forward if isinstance(built, nn.Module) else built).parameters))
        if self.kind == "head":
            return {first: torch.randn(samples, self._size(built, "in_dim"))}
        if hasattr(built, "vocab_size"):
            return {first: torch.randint(0, built.vocab_size, (samples, self._size(built, "context_length")))}
        size = self._size(built, "img_size")
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {first: torch.randn(samples, self._size(built, "in_chans"), height, width)}

    def _size(self, built: Any, name: str) -> Any:
        """A dimension from the built component, its arguments, the signature's default or `USUAL_ARGUMENTS`, in that order."""
        if getattr(built, name, None) is not None:
            return getattr(built, name)
        if name in self.kwargs:
            return self.kwargs[name]
        default = _parameters(self.factory).get(name)
        has_default = default is not None and isinstance(default.default, int | tuple | list)
        return default.default if has_default and default else USUAL_ARGUMENTS[name]


def make_case(
    kind: str, name: str, factory: Callable[..., Any], given: dict[str, Any], distribution: str = "", skip: int = 0
) -> Case:
    """The example of a factory: its own `vitkit_example`, or required arguments by their usual names; the arguments in `given` win.

    `skip` is the number of leading arguments that are fixed, such as the name of a family's member.
    """
    example = getattr(factory, "vitkit_example", None)
    parameters = list(_parameters(factory).values())
    fixed = {parameter.name for parameter in parameters[:skip]}
    if example is not None:
        draw = partial(_example, f"{kind} {name!r}", example)
        with torch.random.fork_rng(devices=[]):
            kwargs = {key: value for key, value in draw(2)[0].items() if key not in fixed}
        return Case(kind, name, factory, {**kwargs, **given}, distribution, lambda samples: draw(samples)[1])
    kwargs, store = dict(given), None
    for parameter in parameters[skip:]:
        if parameter.default is not parameter.empty or parameter.name in kwargs:
            continue
        if parameter.name == "root":
            kwargs["root"], store = str(image_folder() / "images"), image_folder() / "store"
        elif parameter.name in USUAL_ARGUMENTS:
            kwargs[parameter.name] = USUAL_ARGUMENTS[parameter.name]
    return Case(kind, name, factory, kwargs, distribution, store=store)


@contextmanager
def _store(folder: Path | None) -> Iterator[None]:
    """Use `folder` as the dataset store, so that a check leaves nothing in the user's store."""
    before = os.environ.get("VITKIT_DATA")
    if folder is not None:
        os.environ["VITKIT_DATA"] = str(folder)
    try:
        yield
    finally:
        if folder is not None:
            os.environ.pop("VITKIT_DATA")
            os.environ.update({} if before is None else {"VITKIT_DATA": before})


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}


def _example(component: str, example: Callable[[int], Any], samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
    answer = example(samples)
    if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(part, dict) for part in answer):
        raise ConformanceError(
            f"vitkit_example of {component} returned {answer!r:.80}; expected two dicts, (arguments, inputs), for a number of samples"
        )
    return answer


def find(asked: str, kind: str | None = None, **given: Any) -> list[Case]:
    """The cases of a distribution, of a registered name in every kind that has it, or of DISTRIBUTION:NAME.

    Raises `UnknownNameError` if nothing installed has that name, and `UsageError` for arguments to several components.
    """
    registries = [registry for registry in REGISTRIES.values() if kind in (None, registry.kind)]
    entries = [
        entry
        for registry in registries
        for entry in registry.entries()
        if canonical(entry.distribution) == canonical(asked)
    ]
    if entries and given and len(entries) > 1:
        several = ", ".join(entry.name for entry in entries)
        raise UsageError(f"arguments go with one name, and {asked} registers {several}; name one of them")
    if not entries:
        short = asked.rpartition(":")[2]
        entries = [registry.entry(asked) for registry in registries if short in registry]
    if not entries:
        names = sorted({word for r in registries for e in r.entries() for word in (e.name, e.distribution)})
        raise UnknownNameError(f"nothing installed is called {asked!r}{nearest(asked, names) or ';'} known: {', '.join(names)}")
    cases = []
    for entry in entries:
        factory = replace(entry, member=None).load()
        cases.append(make_case(entry.kind, entry.name, factory, given, entry.distribution, int(entry.member is not None)))
    return cases


def small_dataset(train: int = 24, val: int = 6, test: int = 12) -> ImageDataset:
    """Made-up grey images `(1 8 8)` of three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, count in (("train", train), ("val", val), ("test", test)):
        labels = torch.arange(count) % 3
        noise = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
        tensors[f"{split}.images"] = (labels.view(-1, 1, 1, 1) * 90 + noise).to(torch.uint8)
        tensors[f"{split}.labels"] = labels
    return from_store(Stored("shades", ["dark", "grey", "light"], tensors), source="made up", licence="none")


class SmallBackbone(nn.Module):
    """Images `(b 1 8 8)` → sixteen tokens of eight dimensions: patches of 2×2 pixels under a linear map."""

    embed_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.patches(x))).flatten(2).mT  # (b d h w) → (b n d)

    def encode_image(self, x: Tensor) -> Tensor:
        return self(x).mean(dim=1)


class SmallModel(nn.Module):
    """A model with a `backbone` for `small_dataset`, in training mode; it tells images by their brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SmallBackbone()

    def encode_image(self, images: Tensor) -> Tensor:
        return self.backbone.encode_image(images)


def small_model() -> SmallModel:
    return SmallModel()


@cache
def image_folder() -> Path:
    """A folder with made-up `images`, four in each of two classes, kept until the process ends."""
    holder = tempfile.TemporaryDirectory(prefix="vitkit-images-")
    atexit.register(holder.cleanup)
    for number, label in enumerate(("dark", "light")):
        folder = Path(holder.name) / "images" / label
        folder.mkdir(parents=True)
        for index in range(4):
            pixels = np.full((16, 16, 3), 60 + 120 * number + 10 * index, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return Path(holder.name)
