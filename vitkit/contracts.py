"""What a plugin author implements: five protocols, and the few values that pass between them.

A factory (a class or a function) is registered under an entry-point group. Called with plain keyword arguments, it returns an
object that follows the protocol of its kind. Nothing has to be subclassed.

| kind      | entry-point group   | the factory returns                                               |
|-----------|---------------------|-------------------------------------------------------------------|
| backbone  | `vitkit.backbones`  | `nn.Module`: images `(b c h w)` or ids `(b l)` → tokens `(b n d)` |
| head      | `vitkit.heads`      | `nn.Module`: features `(b d)` → the output of its task            |
| loss      | `vitkit.losses`     | `nn.Module`: → `{"loss": scalar, part: scalar, ...}`              |
| dataset   | `vitkit.datasets`   | `Dataset`: splits of images, their classes, source and licence    |
| evaluator | `vitkit.evaluators` | callable `(model, dataset, split="test") -> Scores`               |

A plugin that offers more models than entry points registers a family: with `"timm/*" = "vitkit_timm:TimmBackbone"` the name
`timm/resnet18` calls `TimmBackbone("resnet18", ...)`.

A plugin can also add a subcommand under `vitkit.commands`: a function whose typed arguments are the command's arguments.

`run.save(name=module, ...)` saves each module under a name. Commands that work on any saved model look for these names:

| module       | what it is                                                                                            |
|--------------|-------------------------------------------------------------------------------------------------------|
| `backbone`   | `encode_image(images) -> (b d)`: features of images; optionally `encode_label(labels)`, of labels      |
| `classifier` | a head, features `(b d)` → logits `(b k)` over the model's `classes`                                    |
| `projector`  | a head, features of an image or a label `(b d)` → the space in which cosines compare them              |
| `decoder`    | a head, latents `(b z)` → images `(b c h w)` in [0, 1]; the backbone offers `encode_latent(images)`      |
| `text`       | ids `(b l)`; `encode_text(list of str) -> (b d)`, then `text_projector` if there is one                |

The conformance kit (`vitkit check NAME`, `vitkit.testing`) checks a small example of every registered component. It builds the
component with its defaults, fills required arguments by their usual names (`in_dim`, `out_dim`, `num_classes`, `in_chans`,
`img_size`, `vocab_size`, `context_length`, and `root`, a folder of images), and calls it with random images, ids or features of
these sizes. A component that needs other arguments or inputs declares them, a class by a static method, a function by
`with_example`:

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict, dict]:
        return {"temperature": 0.1}, {"image": torch.randn(samples, 8), "text": torch.randn(samples, 8)}

The first dict holds small arguments that build the component. The second holds, by name, the inputs for that number of samples;
leave it empty for the usual inputs. A loss must declare its inputs. An evaluator may declare another `model` and `dataset`. The
dimension of a tensor that grows with the number of samples is the one that is divided among processes.

A saved model may come from a stranger. While it is loaded, a component takes only numbers, flags, None, lists of these, and strings that
its signature lists in a `Literal`. A component with other strings, with dicts or with `**kwargs` declares what they may be:

    vitkit_architecture = {"vocabulary": r"[a-z]+", "**": int | None}

See `vitkit.component_arguments`. Saving warns of an argument that loading would refuse.

Terms of this project:

- Spec: the kind, name, distribution and arguments of a component; `spec.build()` builds the component again.
- recipe: a Python file with a `main(run, ...)` that `vitkit run` calls.
- run: one execution of a recipe, and the directory that it writes.
- split: one part of a dataset: train, val or test.
- protocol of a metric: how it was measured; here a `Measurement`.
- reference: a line drawn beside a curve or a result, for example a published number.
- rank: one process of a distributed job; `world_size` is their number.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

UNLABELLED = -1
"""The label of an image without a label, or whose label is masked."""


@runtime_checkable
class Backbone(Protocol):
    """Images `(b c h w)` or token ids `(b l)` → tokens `(b n d)` with `d == embed_dim`.

    A backbone that can take further tokens into its attention stack (a label, a caption) accepts
    `extra_tokens` of shape `(b m d)` by keyword. A backbone may offer `encode_image(images) -> (b d)`, its own
    pooled features; where it does not, evaluators take the mean over its tokens. A backbone whose weights other libraries
    publish under other names may offer `published_names`, see `vitkit.load_weights`.

    A backbone whose first tokens are no patches gives their number as `num_prefix_tokens`, and the first of them, if it is a CLS token, as
    `cls_token`, as timm's models do. The others are patches in row-major order, unless `tokens_in_rows` is False. `vitkit attend` reads
    these attributes.
    """

    embed_dim: int

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Head(Protocol):
    """Features `(b in_dim)` → `(b out_dim)`. The factory takes `in_dim` and `out_dim` by keyword."""

    def __call__(self, features: Tensor) -> Tensor: ...


@runtime_checkable
class Loss(Protocol):
    """Anything → a mapping of scalar tensors that holds `"loss"`, the value to minimise, and its named parts.

    A loss can offer `uninformed(batch_size) -> {part: value}`: the value of each part for a prediction that uses no
    information about its input, ln K for a softmax over K classes and ln `batch_size` for InfoNCE. `batch_size` counts the samples that
    are compared with each other, over all ranks and accumulated batches. A report draws these lines, and a run whose loss has not
    left its line after a tenth of the steps says so.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Batches(Protocol):
    """One split, cut into batches: what `run.fit` draws from.

    `epoch(number)` yields that epoch's batches, a dict each. The same number, seed, rank and world give the same batches, and `start`
    skips that many without making them. A batch of b samples holds

    - `images`: float32 `(b c h w)`, normalised, or `(b v c h w)` for v augmented views of each image.
    - `labels`: int64 `(b,)`, `UNLABELLED` for an image without a label.
    - `views`, where views of several kinds were asked for (`vitkit.data.View`): a tuple of tensors `(b v c h w)`, one for each kind,
      whose v, h and w may differ; `images` is the first of them.
    - `partners` int64 `(b,)` and `weights` in [0, 1] `(b,)`, where images are mixed in pairs: the labels of the images mixed in.
      `labels` count by `weights`, `partners` by 1 − `weights`.

    A rank's batch may be smaller than the others', or empty, at the end of an epoch that is not shuffled.
    """

    def __len__(self) -> int: ...

    def epoch(
        self, number: int, *, seed: int = 0, start: int = 0, device: Any = "cpu", rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Any]]: ...


@runtime_checkable
class LazyImages(Protocol):
    """Images that are read when a batch needs them; a split may hold these instead of a tensor uint8 `(n c h w)`.

    Rows, int64 `(m,)`, count the images from 0.

    - `read(shares)`: for each index tensor, reading ahead, the images uint8 `(k c h w)` that can be read, and their rows `(k,)`, in
      order.
    - `index_select(0, rows)`: the images of all these rows; raises `DatasetError` for an image that cannot be read.
    - `subset(rows)`: the same images, fewer or repeated, still unread.
    - `order(generator, size)`: a permutation of all rows `(n,)` that depends only on the state of `generator` and suits batches of
      `size` images over all ranks, each of which takes a consecutive part of a batch.
    - `locality`: images at most this many positions apart in `order` are cheap to read together; n or more means random access.
    - `skipped`: a line for each image that could not be read so far.
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
    def locality(self) -> int: ...

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
    """Three splits of images, labelled or not, and facts that a person needs to judge results on them.

    `mean` and `std` are per channel, of pixels scaled to [0, 1]; `shape` is `(c, h, w)` as batches deliver it. `val` is split off the
    training images where the source has no validation split. Labels of images without a label are `UNLABELLED`.
    """

    name: str
    classes: list[str]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    licence: str
    train: Split
    val: Split
    test: Split


SplitName = Literal["train", "val", "test"]


@runtime_checkable
class Evaluator(Protocol):
    """A model, a dataset and the split to measure on → `Scores`.

    Names of metrics on the validation split begin with `val_`. Training images, where an evaluator needs them (the neighbours of
    kNN, the fit of a linear probe), always come from `dataset.train`. An evaluator leaves the model's mode, gradients and random state as
    they were.
    """

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> "Scores": ...


@runtime_checkable
class TrainedModel(Protocol):
    """A saved model as other modules use it: `vitkit.models.Model` follows this protocol."""

    config: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]

    def encode_image(self, images: Tensor) -> Tensor: ...

    def preprocess(self, images: Any) -> Tensor: ...


MetricKind = Literal["proportion", "error", "score"]
"""A proportion lies in [0, 1] and counts samples; an error is best at 0; a score is any other number."""


@dataclass(frozen=True)
class Measurement:
    """How one number was measured: the protocol of a metric.

    - `split`, `samples`: the split, and how many samples of it.
    - `chance`: the value of guessing, where it is known.
    - `frozen`: the part of the model that was not trained for the measurement.
    - `note`: further conditions, for a person.
    - `kind`, `unit`: what sort of number it is, and its unit ("dB", "images/s"); proportions have none.
    - `direction`: "max" where higher is better, "min" where lower is better; an error's is "min".
    - `untrained`: the value for the network before training, where it was measured.
    """

    split: str
    samples: int
    chance: float | None = None
    frozen: str = ""
    note: str = ""
    kind: MetricKind = "score"
    unit: str = ""
    direction: Literal["max", "min"] = "max"
    untrained: float | None = None

    def __post_init__(self) -> None:
        if self.kind == "error":
            object.__setattr__(self, "direction", "min")


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


@dataclass(frozen=True)
class Proportions:
    """A share for each name: `hits` of `totals` samples; the report draws each with its 95 % interval, the lowest share first."""

    names: list[str]
    hits: Any
    totals: Any


ReportFigure = Confusion | Embeddings | Attention | Sheet | Proportions


class Scores(dict[str, float]):
    """Floats by name, with the protocol of each and the figures that belong to them.

    `a | b` joins two of them with their protocols and figures; on equal names `b` wins.
    """

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

    def __or__(self, other: Mapping[str, float]) -> "Scores":  # type: ignore[override]
        joined = Scores(self, protocols=self.protocols, figures=self.figures)
        joined |= other
        return joined

    def __ior__(self, other: Mapping[str, float]) -> "Scores":  # type: ignore[override]
        self.update({name: float(value) for name, value in other.items()})
        if isinstance(other, Scores):
            self.protocols |= other.protocols
            self.figures |= other.figures
        return self

    def prefixed(self, prefix: str) -> "Scores":
        """The same scores with `prefix` before every name."""
        return Scores(
            {prefix + name: value for name, value in self.items()},
            protocols={prefix + name: protocol for name, protocol in self.protocols.items()},
            figures={prefix + name: figure for name, figure in self.figures.items()},
        )


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
    "MetricKind",
    "Proportions",
    "ReportFigure",
    "Scores",
    "Sheet",
    "Split",
    "SplitName",
    "TrainedModel",
    "with_example",
]
