"""A saved model as one file for other runtimes: ONNX, or torch's own exported program."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit.contracts import TrainedModel
from vitkit.data.preprocess import Preprocessing
from vitkit.errors import UsageError, VitkitError, printable
from vitkit.files import atomic_write

Format = Literal["onnx", "torch-export"]
SUFFIX: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
OPSET = 18
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference between outputs of the exported and of the saved model, as a share of the largest value of that output."""
CHECKED_BATCHES = (1, 3)
"""Batch sizes of the check: the model is traced with another one."""
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Export:
    """An exported file: its outputs by name with their widths, and the largest difference, as a share of the largest value."""

    path: Path
    outputs: dict[str, int]
    difference: float


class Exported(nn.Module):
    """Images float32 `(n c h w)` in [0, 1] → `features` `(n d)` and the outputs of the saved heads.

    It normalises images, but does not resize them. `embedding` is the projector's output, `probabilities` the softmax of the
    classifier's logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.encode_image((images - self.mean) / self.std)
        outputs = {"features": features}
        projector: Any = getattr(self.model, "projector", None)
        classifier: Any = getattr(self.model, "classifier", None)
        if projector is not None:
            outputs["embedding"] = projector(features)
        if classifier is not None:
            outputs["probabilities"] = classifier(features).softmax(dim=1)
        return outputs


def export(model: TrainedModel, out: str | Path, *, format: Format | None = None, overwrite: bool = False) -> Export:
    """Write a model to `out`, for the CPU in fp32, and check that the file gives the same numbers.

    Its input `images` is float32 `(batch c h w)` in [0, 1], of the size of `model.preprocessing`, with any batch size; its outputs are
    those of `Exported`, in that order. `format` is onnx or torch-export (default: by the suffix of `out`, .onnx or .pt2). The metadata
    of an ONNX file holds `classes` and `preprocessing` as JSON. Before the file takes its place, onnxruntime or torch runs it on noise in
    batches of other sizes. Raises `UsageError` for another suffix, a file that exists, a model without preprocessing and
    packages that are missing; `VitkitError` if the model cannot be exported or the numbers differ.
    """
    out = Path(out)
    suffix = out.suffix if format is None else SUFFIX.get(format, "")
    if suffix not in SUFFIX.values() or out.suffix != suffix or out.is_dir():
        raise UsageError(f"cannot export to {out}: expected a name that ends with .onnx (onnx) or .pt2 (torch-export)")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists already; choose another name, or give --overwrite")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None] if suffix == ".onnx" else []
    if missing:
        raise UsageError(f"exporting to ONNX needs {', '.join(missing)}: pip install 'vitkit[export]'")
    if not model.preprocessing:
        raise UsageError("this model was saved without preprocessing, so the size of its images is unknown")
    preprocessing = Preprocessing.from_json(model.preprocessing)
    wrapped = Exported(model, preprocessing).cpu().float().eval()
    example = _noise(2, preprocessing)
    with torch.no_grad():
        outputs = {name: value.shape[1] for name, value in wrapped(example).items()}
        checks = [(images, wrapped(images)) for images in (_noise(count, preprocessing) for count in CHECKED_BATCHES)]
    with atomic_write(out) as temporary:
        file = temporary.with_suffix(suffix)
        try:
            run = (_to_onnx if suffix == ".onnx" else _to_torch)(wrapped, example, file, model)
            difference = max(
                _difference(name, value, run(images)[name])
                for images, expected in checks
                for name, value in expected.items()
            )
            file.replace(temporary)
        finally:
            file.unlink(missing_ok=True)
    return Export(out, outputs, difference)


def _to_onnx(wrapped: Exported, example: Tensor, file: Path, model: TrainedModel) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    with _exporting("ONNX"):
        names = list(wrapped(example))
        program = torch.onnx.export(
            _traced(wrapped, example), input_names=["images"], output_names=names, dynamo=True, opset_version=OPSET,
            verbose=False,
        )  # fmt: skip
        assert program is not None
        program.model.metadata_props.update(
            classes=json.dumps(model.classes), preprocessing=json.dumps(model.preprocessing)
        )
        program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        outputs: Any = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}

    return run


def _to_torch(wrapped: Exported, example: Tensor, file: Path, model: TrainedModel) -> Callable[[Tensor], Outputs]:
    with _exporting("a torch program"):
        program = _traced(wrapped, example)
        about = {"classes.json": json.dumps(model.classes), "preprocessing.json": json.dumps(model.preprocessing)}
        torch.export.save(program, file, extra_files=about)
        module = torch.export.load(file).module()

    def run(images: Tensor) -> Outputs:
        with torch.no_grad():
            outputs: Outputs = module(images)
        return outputs

    return run


def _traced(wrapped: Exported, example: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(wrapped, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})


@contextlib.contextmanager
def _exporting(target: str) -> Iterator[None]:
    """Within this block the exporters' log messages and warnings are silent; their errors become `VitkitError`."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters raise many kinds
        raise VitkitError(f"this model cannot be exported to {target}: {type(error).__name__}: {printable(error)}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _noise(count: int, preprocessing: Preprocessing) -> Tensor:
    return torch.rand(count, *preprocessing.shape, generator=torch.Generator().manual_seed(count))


def _difference(name: str, saved: Tensor, exported: Tensor) -> float:
    """The largest difference as a share of the largest value; `VitkitError` beyond the tolerance and for another shape."""
    if saved.shape != exported.shape:
        raise VitkitError(f"the exported model gives {name} {tuple(exported.shape)}, the saved one {tuple(saved.shape)}")
    share = float((saved - exported).abs().max() / saved.abs().max().clamp(min=1e-12))
    if not share <= TOLERANCE:
        raise VitkitError(
            f"the exported model's {name} differ from the saved one's by {share:.2e} of their largest value; expected "
            f"{TOLERANCE:g} at most; nothing was written"
        )
    return share


__all__ = ["Export", "Exported", "export"]
