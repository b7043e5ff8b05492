"""Saved models: `model.safetensors` beside a `config.json` that says from which registered names to build them."""

import hashlib
import json
import keyword
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vitkit.contracts import Scores
from vitkit.data.preprocess import Preprocessing, preprocess
from vitkit.errors import CheckpointError, MissingPluginError, UnknownNameError, UsageError
from vitkit.files import atomic_write, write_json
from vitkit.models.features import encode_image
from vitkit.models.image_sources import prepared
from vitkit.models.memory_limit import MemoryLimit, check_size
from vitkit.models.predict import Prediction, predict
from vitkit.models.untrusted import AGAIN, plain_size, read_json
from vitkit.registry import ADDED, Spec, version_of

if TYPE_CHECKING:
    from PIL import Image

    from vitkit.models.export import Export

    Images = str | Path | Tensor | Sequence[str | Path | Image.Image]

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS = ("backbone", "head", "loss")
"""What a saved model is built from; the other registries read files and download, which loading must not."""
ROOM = 256 * 2**20
"""How many bytes building may take besides four times the weights: for tables and masks that are not saved."""


class VersionWarning(UserWarning):
    """A saved model was built with another version of a plugin than the one installed."""


class Model(nn.Module):
    """A loaded model: its saved modules as attributes, and what is needed to use them.

    `config` is `config.json`, `classes` the class names, `preprocessing` what `preprocess` does.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.config = dict(config)
        self.classes: list[str] = list(config["classes"])
        self.preprocessing: dict[str, Any] = dict(config["preprocessing"])

    def preprocess(self, images: "Tensor | Sequence[Image.Image]") -> Tensor:
        """uint8 `(n c h w)` in [0, 255] or Pillow images → float32 `(n c h w)` as in training: sized and normalised.

        Raises `UsageError` for another type or number of channels, or where the model was saved without preprocessing.
        """
        if not self.preprocessing:
            raise UsageError("this model was saved without preprocessing; normalise images as its training did")
        return preprocess(images, Preprocessing.from_json(self.preprocessing))

    def encode_image(self, images: Tensor) -> Tensor:
        """Preprocessed images `(n c h w)` → the backbone's pooled features `(n d)`."""
        backbone = getattr(self, "backbone", None)
        if backbone is None:
            raise UsageError("this model was saved without a module named 'backbone'")
        return encode_image(backbone, images)

    def embed(self, images: "Images", *, batch_size: int = 256) -> Tensor:
        """A folder, picture files, Pillow images or uint8 `(n c h w)` → features float32 `(n d)` on the CPU.

        A folder's pictures come in alphabetical order, those of folders in it too. Raises `UsageError` for a picture that
        cannot be read, and as `preprocess` does.
        """
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        with torch.no_grad():
            found = [self.encode_image(batch.to(device)).float().cpu() for batch in prepared(self, images, batch_size)]
        return torch.cat(found)

    def predict(
        self, images: "Images", *, labels: Sequence[str] | None = None, top: int | None = None, batch_size: int = 256
    ) -> list[Prediction]:
        """What a folder, picture files, Pillow images or uint8 `(n c h w)` show: see `vitkit.models.predict.predict`."""
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        batches = prepared(self, images, batch_size)
        return [one for batch in batches for one in predict(self, batch.to(device), labels=labels, top=top)]

    def evaluate(self, evaluator: Any, dataset: Any) -> Scores:
        """An evaluator's scores on a dataset, whose images are prepared as this model's training images were.

        Raises `UsageError` as the evaluator does, and for images with another number of channels.
        """
        if self.preprocessing and hasattr(dataset, "with_preprocessing"):
            dataset = dataset.with_preprocessing(Preprocessing.from_json(self.preprocessing))
        scores: Scores = evaluator(self, dataset)
        return scores

    def export(self, out: str | Path, *, overwrite: bool = False) -> "Export":
        """Write `out`, an .onnx file or a .pt2 one, checked to give the same numbers: see `vitkit.models.export.export`."""
        from vitkit.models.export import export

        return export(self, out, overwrite=overwrite)


def save(
    directory: str | Path,
    modules: Mapping[str, nn.Module],
    *,
    preprocessing: Mapping[str, Any],
    classes: list[str],
    arguments: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write modules that registries built: their tensors and their Specs.

    The weights are written first and the config, which holds their size and SHA-256, after them: an old config beside
    new weights is noticed when loading. Raises `UsageError` for a module without a Spec, a name that no attribute can
    have, a state that is no tensor and arguments that are not plain JSON, and `RunError` where the disk refuses.
    """
    directory = Path(directory)
    specs, tensors = {}, {}
    for name, module in modules.items():
        spec = getattr(module, "spec", None)
        if not isinstance(spec, Spec):
            raise UsageError(
                f"module {name!r} ({type(module).__name__}) was not built by a registry, so no one could build it "
                f"again; register it and use e.g. heads.build(...), or heads.add(...) in a notebook"
            )
        if not _is_free(name):
            raise UsageError(f"a module is saved under a name that can be an attribute of the model; given {name!r}")
        specs[name] = spec.to_json()
        for key, value in module.state_dict().items():
            if not isinstance(value, Tensor):
                raise UsageError(f"the state {key!r} of module {name!r} is a {type(value).__name__}, not a tensor")
            # Each by itself: safetensors refuses tensors that share memory, as tied weights do.
            tensors[f"{name}.{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    body = to_bytes(tensors, metadata={"format": "pt"})
    config = {
        **(extra or {}),
        "format": FORMAT,
        "library": "vitkit",
        "version": version_of("vitkit"),
        "modules": specs,
        "preprocessing": dict(preprocessing),
        "classes": list(classes),
        "arguments": dict(arguments),
        "weights": {"file": WEIGHTS, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()},
    }
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:  # before the weights are written, which would not have their config
        raise UsageError(f"a saved model's config holds plain JSON values alone: {error}") from None
    with atomic_write(directory / WEIGHTS) as temporary:
        temporary.write_bytes(body)
    write_json(directory / CONFIG, config)


def load(source: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Rebuild a saved model from its names and load its weights strictly, in evaluation mode.

    `source` is a directory that a run saved into. Nothing in it is executed: only registered backbones, heads and losses
    are built, with arguments checked against their signatures, and tensors are read from safetensors. The random state
    stays as it was. Raises `CheckpointError` for files that are missing, damaged or foreign and `MissingPluginError` for
    a plugin that is not installed; warns with `VersionWarning` where another version of it is.
    """
    directory = Path(source)
    config = _read_config(directory)
    tensors = _read_weights(directory, config["weights"])
    most = ROOM + 4 * config["weights"]["bytes"]
    parameters = 64 + 8 * len(tensors)  # some build parts that they then replace
    with torch.random.fork_rng(devices=[]), MemoryLimit(most):  # building draws weights, on the CPU
        built = {name: _build(directory, name, data, most, parameters) for name, data in config["modules"].items()}
    modules = {name: module for name, (module, _) in built.items()}
    _check_tensors(directory, modules, tensors, "".join(mend for _, mend in built.values()))
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own, strict=True)
    return Model(modules, config).to(device).eval()


def check(directory: str | Path) -> dict[str, Any]:
    """The config of a saved model whose two files are whole and belong together; nothing is built.

    Raises `CheckpointError` for files that are missing, damaged or foreign.
    """
    config = _read_config(Path(directory))
    _read_weights(Path(directory), config["weights"])
    return config


def _is_free(name: str) -> bool:
    """Whether a module of a model can have this name: `model.<name>` is not something else already."""
    empty = Model({}, {"classes": [], "preprocessing": {}})
    return name.isidentifier() and not keyword.iskeyword(name) and not hasattr(empty, name)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        there = "that is a file" if directory.exists() else "no such directory"
        raise CheckpointError(f"no model at {directory}: {there}; give a directory that a run saved into")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("library") != "vitkit":
        raise CheckpointError(f'{path} is no vitkit config: expected an object with "library": "vitkit"')
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {config.get('format')!r:.20}, this vitkit reads {FORMAT}; pip install --upgrade vitkit"
        )
    _check_fields(path, config)
    return config


def _check_fields(path: Path, config: Mapping[str, Any]) -> None:
    wanted = {"modules": dict, "preprocessing": dict, "classes": list, "arguments": dict, "weights": dict}
    for key, kind in wanted.items():
        if not isinstance(config.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} should be a {kind.__name__}, is {config.get(key)!r:.60}")
    if not all(isinstance(name, str) for name in config["classes"]):
        raise CheckpointError(f"{path}: 'classes' should be a list of names, is {config['classes']!r:.60}")
    try:
        if config["preprocessing"]:
            Preprocessing.from_json(config["preprocessing"])
    except (UsageError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_weights(directory: Path, recorded: Mapping[str, Any]) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    try:
        size = plain_size(path)
        body = path.read_bytes() if size == recorded.get("bytes") else b""
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; {AGAIN}") from None
    if size != recorded.get("bytes"):
        raise CheckpointError(
            f"{path} has {size} bytes, its config says {recorded.get('bytes')!r:.40}: cut short or foreign; {AGAIN}"
        )
    try:
        tensors = read_tensors(body)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file ({error}); {AGAIN}") from None
    if hashlib.sha256(body).hexdigest() != recorded.get("sha256"):
        raise CheckpointError(
            f"{path} is not the file that was saved: its SHA-256 differs from the one in {CONFIG}; {AGAIN}"
        )
    return tensors


def _build(directory: Path, name: str, data: Any, most: int, parameters: int) -> tuple[nn.Module, str]:
    """A module, and how to mend it where another version of its plugin is installed than it was saved with."""
    where = f"{directory / CONFIG}: module {name!r}"
    try:
        spec = Spec.from_json(data)
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if not _is_free(name):
        raise CheckpointError(f"{where} has a name that no attribute of a model can have")
    if spec.kind not in KINDS:
        raise CheckpointError(f"{where} is of kind {spec.kind!r:.40}; a saved model is built from {', '.join(KINDS)}")
    what, saved, here = f"the {spec.kind} {spec.name!r}", data.get("version"), version_of(spec.distribution)
    pin = f"pip install '{spec.distribution}=={saved}'" if saved else f"pip install '{spec.distribution}'"
    mend = ""
    if spec.distribution != ADDED:
        if here is None:
            raise MissingPluginError(f"{where} is {what} of {spec.distribution} {saved}, which is not installed: {pin}")
        if here != saved:
            said = f"saved with {spec.distribution} {saved}, installed is {here}"
            warnings.warn(f"{where} was {said}", VersionWarning, stacklevel=4)
            mend = f"; {name!r} was {said}: {pin}"
    try:
        check_size(spec.build, most, parameters)
        module = spec.build()
    except UnknownNameError as error:
        if spec.distribution == ADDED:
            raise MissingPluginError(
                f"{where} was added by hand as {what}: call vitkit.REGISTRIES[{spec.kind!r}].add({spec.name!r}, ...) "
                f"with the same class before loading"
            ) from None
        raise CheckpointError(f"{where} cannot be built: {error}{mend}") from None
    except Exception as error:  # a plugin's factory may raise anything
        said = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where} cannot be built: {said}{mend}") from error
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{where}: {what} is no torch module but a {type(module).__name__}{mend}")
    return module, mend


def _check_tensors(directory: Path, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], mend: str) -> None:
    path = directory / WEIGHTS
    wanted = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    lacks, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if lacks or foreign:
        raise CheckpointError(
            f"{path} does not fit its config: lacks {_some(lacks)}; does not belong: {_some(foreign)}{mend}"
        )
    for key, value in wanted.items():
        found = tensors[key]
        if value.shape != found.shape and not (found.ndim == 0 and value.shape == (1,)):  # see distributed/scalars.py
            raise CheckpointError(
                f"{path}: {key} has the shape {tuple(found.shape)}, its config builds {tuple(value.shape)}{mend}"
            )
        if value.dtype != found.dtype:
            raise CheckpointError(f"{path}: {key} is {found.dtype}, its config builds {value.dtype}{mend}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


__all__ = ["Model", "VersionWarning", "check", "load", "save"]
