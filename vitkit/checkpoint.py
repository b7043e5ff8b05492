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

from vitkit.batches import Preparation
from vitkit.errors import CheckpointError, MissingPluginError, UnknownNameError, UsageError
from vitkit.files import atomic_write, write_json
from vitkit.preprocessing import preprocess
from vitkit.registry import ADDED, Spec, version_of

if TYPE_CHECKING:
    from PIL import Image

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS = ("backbone", "head", "loss")
"""What a saved model is built from; the other registries read files and download, which loading must not."""
CONFIG_BYTES, DEPTH = 32 * 2**20, 32
"""How long and how deeply nested a config may be: far beyond any that names thousands of classes."""
AGAIN = "copy or download the whole directory again"


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
        return preprocess(images, Preparation.from_json(self.preprocessing))

    def encode_image(self, images: Tensor) -> Tensor:
        """Preprocessed images `(n c h w)` → the backbone's pooled features `(n d)`."""
        backbone = getattr(self, "backbone", None)
        if backbone is None:
            raise UsageError("this model was saved without a module named 'backbone'")
        return encode_image(backbone, images)


def encode_image(backbone: Any, images: Tensor) -> Tensor:
    """Pooled features `(b d)`: a backbone's own `encode_image`, or the mean over its tokens `(b n d)`.

    Raises `UsageError` where it returns something else.
    """
    pooled = getattr(backbone, "encode_image", None)
    found = (backbone if pooled is None else pooled)(images)
    axes = 3 if pooled is None else 2
    if not isinstance(found, Tensor) or found.ndim != axes or len(found) != len(images):
        what = f"tokens ({len(images)}, n, d)" if pooled is None else f"encode_image to give ({len(images)}, d)"
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"{type(backbone).__name__} gave {given} for {len(images)} images; expected {what}")
    return found.mean(dim=1) if pooled is None else found


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
    with torch.random.fork_rng(devices=[]):  # building draws weights, on the CPU
        built = {name: _build(directory, name, data) for name, data in config["modules"].items()}
    modules = {name: module for name, (module, _) in built.items()}
    _check_tensors(directory, modules, tensors, "".join(mend for _, mend in built.values()))
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own, strict=True)
    return Model(modules, config).to(device).eval()


def _is_free(name: str) -> bool:
    """Whether a module of a model can have this name: `model.<name>` is not something else already."""
    empty = Model({}, {"classes": [], "preprocessing": {}})
    return name.isidentifier() and not keyword.iskeyword(name) and not hasattr(empty, name)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        there = "that is a file" if directory.exists() else "no such directory"
        raise CheckpointError(f"no model at {directory}: {there}; give a directory that a run saved into")
    try:
        size = path.stat().st_size
        config = json.loads(path.read_text(encoding="utf-8")) if size <= CONFIG_BYTES else None
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} holds no {CONFIG}: no model was saved there, or its run has not ended"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read; {AGAIN}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}; {AGAIN}") from None
    if size > CONFIG_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; a vitkit config has at most {CONFIG_BYTES:,}")
    if not isinstance(config, dict) or config.get("library") != "vitkit":
        raise CheckpointError(f'{path} is no vitkit config: expected an object with "library": "vitkit"')
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {config.get('format')!r:.20}, this vitkit reads {FORMAT}; pip install --upgrade vitkit"
        )
    if _depth(config) > DEPTH:
        raise CheckpointError(f"{path} is nested more than {DEPTH} levels deep; no vitkit config is")
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
            Preparation.from_json(config["preprocessing"])
    except (UsageError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _depth(value: Any) -> int:
    """How deeply dicts and lists are nested, counted without recursion."""
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(child, level + 1) for child in children]
    return deepest


def _read_weights(directory: Path, recorded: Mapping[str, Any]) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    try:
        size = path.stat().st_size
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


def _build(directory: Path, name: str, data: Any) -> tuple[nn.Module, str]:
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
        if value.shape != found.shape:
            raise CheckpointError(
                f"{path}: {key} has the shape {tuple(found.shape)}, its config builds {tuple(value.shape)}{mend}"
            )
        if value.dtype != found.dtype:
            raise CheckpointError(f"{path}: {key} is {found.dtype}, its config builds {value.dtype}{mend}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


__all__ = ["Model", "VersionWarning", "encode_image", "load", "save"]
