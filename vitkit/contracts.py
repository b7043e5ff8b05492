"""What a plugin author implements: five protocols and the few values that pass between them.

A factory (a class or a function) is registered under an entry-point group; calling it with plain keyword
arguments returns an object that follows the protocol of its kind. Nothing has to be subclassed.

| kind      | entry-point group   | the factory returns                                             |
|-----------|---------------------|-----------------------------------------------------------------|
| backbone  | `vitkit.backbones`  | `nn.Module`: images `(b c h w)` or ids `(b l)` → tokens `(b n d)` |
| head      | `vitkit.heads`      | `nn.Module`: features `(b d)` → whatever its task needs           |
| loss      | `vitkit.losses`     | `nn.Module`: → `{"loss": scalar, part: scalar, ...}`              |
| dataset   | `vitkit.datasets`   | `Dataset`: splits of tensors and what to know of them             |
| evaluator | `vitkit.evaluators` | callable `(model, dataset) -> Scores`                             |

A plugin with more models than entry points registers a family: `"timm/*" = "vitkit_timm:TimmBackbone"` has its factory called
as `TimmBackbone("resnet18", ...)` for `timm/resnet18`.

A plugin may also add a subcommand: `vitkit.commands`, a function whose typed arguments are the command's.

What is saved with `run.save(name=module, ...)` is found again by its name. Commands that work on any saved model know these:

| module       | what it is                                                                                         |
|--------------|----------------------------------------------------------------------------------------------------|
| `backbone`   | `encode_image(images) -> (b d)`: features of an image; where it offers `encode_label(labels)`, of a label |
| `classifier` | a head, features `(b d)` → logits `(b k)` over the model's `classes`                                 |
| `projector`  | a head, features of an image or a label `(b d)` → the space in which they are compared by cosine       |
| `decoder`    | a head, latents `(b z)` → images `(b c h w)` in [0, 1]; its backbone offers `encode_latent(images)`       |
| `text`       | ids `(b l)`; `encode_text(list of str) -> (b d)`, behind `text_projector` if any, compared with `projector`'s by cosine |

The conformance kit (`vitkit check NAME`, `vitkit.testing`) checks a small example of whatever is registered: built with
its defaults, required arguments by their usual names (`in_dim`, `out_dim`, `num_classes`, `in_chans`, `img_size`,
`vocab_size`, `context_length`, and `root`, a folder of pictures), and called with random images, ids or features of these
sizes. A component that needs something else says so, a class in a static method, a function by `with_example`:

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict, dict]:
        return {"temperature": 0.1}, {"image": torch.randn(samples, 8), "text": torch.randn(samples, 8)}

The first dict holds the arguments, small ones, that build it; the second, by name, what it is called with for that many
samples, or nothing for the usual. A loss must have it; an evaluator may give another `model` and `dataset`. The dimension
of a tensor that is longer for more samples is the one that is divided among processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

UNLABELLED = -1
"""The label of an image whose label is not shown."""


@runtime_checkable
class Backbone(Protocol):
    """Images `(b c h w)` or token ids `(b l)` → tokens `(b n d)` with `d == embed_dim`.

    A backbone that can take further tokens into its attention stack (a label, a caption) accepts
    `extra_tokens` of shape `(b m d)` by keyword. A backbone may offer `encode_image(images) -> (b d)`, its own
    pooled features; where it does not, evaluators take the mean over its tokens.
    """

    embed_dim: int

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Head(Protocol):
    """Features `(b in_dim)` → `(b out_dim)`. The factory takes `in_dim` and `out_dim` by keyword."""

    def __call__(self, features: Tensor) -> Tensor: ...


@runtime_checkable
class Loss(Protocol):
    """Anything → a mapping of scalar tensors that holds `"loss"`, the value to minimise, and its named parts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Batches(Protocol):
    """One split, cut into batches: what `run.fit` draws from.

    `epoch(number)` yields that epoch's batches, a dict each with `images` and `labels`. The same number, seed, rank
    and world give the same batches, and `start` skips that many without making them. Where images are mixed in pairs
    there are `partners`, int64 `(b,)`, the labels of the images mixed in, and `weights` in [0, 1] `(b,)`: `labels`
    count by `weights`, `partners` by 1 − `weights`.
    """

    def __len__(self) -> int: ...

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]: ...


@runtime_checkable
class LazyImages(Protocol):
    """Images that are read when a batch takes them: a split may hold these in the place of a tensor uint8 `(n c h w)`.

    Rows, int64 `(m,)`, count the images from 0. `read` gives for each of several index tensors in turn, reading ahead, the
    images uint8 `(k c h w)` of those rows that can be read, and these rows `(k,)`, still in their order; `index_select` the
    images of all rows, and raises `DatasetError` for one that cannot be read; `subset` the same images, fewer or repeated,
    still unread. `order` is a permutation of all rows `(n,)` that depends on the state of `generator` alone and suits batches
    of `size` images over all ranks, each of which takes a consecutive part of a batch. `reach` is how many places of that
    order apart images may lie and still be read at the same time at little cost: n or more where any may. `skipped` has a line
    for each image that could not be read so far.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def ndim(self) -> int: ...

    @property
    def skipped(self) -> list[str]: ...

    @property
    def reach(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, shares: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]: ...

    def index_select(self, dim: int, index: Tensor) -> Tensor: ...

    def subset(self, rows: Tensor) -> "LazyImages": ...

    def order(self, generator: torch.Generator, size: int) -> Tensor: ...


@runtime_checkable
class Split(Protocol):
    """`images`: uint8 `(n c h w)`, memory-mapped, or `LazyImages`; `labels`: int64 `(n,)`."""

    images: Any
    labels: Tensor

    def __len__(self) -> int: ...


@runtime_checkable
class Dataset(Protocol):
    """Two splits of labelled images, and what a person must know of them.

    `mean` and `std` are per channel, of pixels scaled to [0, 1]; `shape` is `(c, h, w)` as batches deliver it.
    """

    name: str
    classes: list[str]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    licence: str
    train: Split
    test: Split


@runtime_checkable
class Evaluator(Protocol):
    """A model and a dataset → `Scores`. It leaves the model's mode, gradients and random state as they were."""

    def __call__(self, model: Any, dataset: Any) -> "Scores": ...


@dataclass(frozen=True)
class Measurement:
    """How one number was measured: `frozen` what, on which `split`, over how many `samples`, and its `chance` level."""

    split: str
    samples: int
    chance: float | None = None
    frozen: str = ""
    note: str = ""


@dataclass(frozen=True)
class Confusion:
    """Counts `(k, k)`: rows are true classes, columns are predicted ones."""

    matrix: Any
    classes: list[str]


@dataclass(frozen=True)
class Embeddings:
    """Features `(n, d)` with the labels `(n,)` they belong to; the report draws them in two dimensions."""

    features: Any
    labels: Any
    classes: list[str]


@dataclass(frozen=True)
class Attention:
    """Images `(n c h w)` in [0, 1], one attention map `(n h w)` each in [0, 1], and a caption each."""

    images: Any
    maps: Any
    captions: list[str]


@dataclass(frozen=True)
class Sheet:
    """Images `(n c h w)` in [0, 1] in rows of `columns`, with a caption each, or none at all; left to right, top down."""

    images: Any
    captions: list[str]
    columns: int = 8


ReportFigure = Confusion | Embeddings | Attention | Sheet


class Scores(dict[str, float]):
    """Floats by name, each with its protocol, and the pictures that go with them."""

    def __init__(
        self,
        values: Mapping[str, float] | None = None,
        *,
        protocols: Mapping[str, Measurement] | None = None,
        figures: Mapping[str, ReportFigure] | None = None,
    ) -> None:
        super().__init__({name: float(value) for name, value in (values or {}).items()})
        self.protocols: dict[str, Measurement] = dict(protocols or {})
        self.figures: dict[str, ReportFigure] = dict(figures or {})


_Factory = TypeVar("_Factory", bound=Callable[..., Any])


def with_example(
    example: Callable[[int], tuple[dict[str, Any], dict[str, Any]]],
) -> Callable[[_Factory], _Factory]:
    """Decorate a factory function with the `vitkit_example` that the conformance kit checks it by."""

    def decorated(factory: _Factory) -> _Factory:
        vars(factory)["vitkit_example"] = example
        return factory

    return decorated


__all__ = [
    "UNLABELLED",
    "Attention",
    "Backbone",
    "Batches",
    "Confusion",
    "Dataset",
    "Embeddings",
    "Evaluator",
    "Head",
    "LazyImages",
    "Loss",
    "Measurement",
    "ReportFigure",
    "Scores",
    "Sheet",
    "Split",
    "with_example",
]
