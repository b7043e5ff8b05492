"""Saved models: `model.safetensors`, and a `config.json` with the registered names to build its modules from.

Loading trusts neither file. It builds only registered components, with arguments that they declare as architecture (see
`vitkit.component_arguments`), within limits of work and memory that follow from the size of the weights; it opens no other file.
"""

import hashlib
import json
import keyword
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vitkit.data.preprocess import Preprocessing
from vitkit.errors import ArgumentsError, CheckpointError, MissingPluginError, UnknownNameError, UsageError
from vitkit.files import atomic_write, write_json
from vitkit.models.memory_limit import MemoryLimit, plan, state_shapes
from vitkit.models.model import Model
from vitkit.models.untrusted import TensorFile, read_json
from vitkit.registry import ADDED, Spec, architecture_only, version_of

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS = ("backbone", "head", "loss")
"""Kinds that a saved model is built from. Components of other kinds read files and download, which loading must not do."""
MAX_MODULES, MAX_NAME_CHARACTERS, MAX_PIXELS = 64, 64, 2**14
LEAST_LARGEST = 2**20
"""Largest allowed number among a component's arguments, unless the weights have more bytes than this."""
VERSION = re.compile(r"[\w.+!-]{1,40}", re.ASCII)

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class VersionWarning(UserWarning):
    """A saved model was built with another version of a plugin than the installed one."""


class ArchitectureWarning(UserWarning):
    """A saved model cannot be loaded, because a component does not declare one of its arguments as architecture."""


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

    The weights are written first, then the config with their size and SHA-256: loading notices an old config beside new
    weights. Raises `UsageError` for a module without a Spec, a name that cannot be an attribute, a state that is no tensor and
    arguments that are not plain JSON, and `RunError` if the files cannot be written.
    """
    directory = Path(directory)
    specs, tensors = {}, {}
    for name, module in modules.items():
        spec = getattr(module, "spec", None)
        if not isinstance(spec, Spec):
            raise UsageError(
                f"module {name!r} ({type(module).__name__}) was not built by a registry, so it cannot be built "
                f"again; register it and use e.g. heads.build(...), or heads.add(...) in a notebook"
            )
        if not _is_free(name):
            raise UsageError(f"a module is saved under a name that can be an attribute of the model; given {name!r}")
        specs[name] = spec.to_json()
        try:
            spec.check_architecture()
        except ArgumentsError as error:  # the weights are saved: a plugin that declares the argument can load them
            warnings.warn(f"module {name!r} is saved, but vitkit.load will refuse it: {error}", ArchitectureWarning, stacklevel=3)
        for key, value in module.state_dict().items():
            if not isinstance(value, Tensor):
                raise UsageError(f"the state {key!r} of module {name!r} is a {type(value).__name__}, not a tensor")
            # A copy each: safetensors refuses tensors that share memory, as tied weights do.
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
    except (TypeError, ValueError) as error:  # raised before the weights are written, which would lack their config
        raise UsageError(f"a saved model's config holds plain JSON values only: {error}") from None
    with atomic_write(directory / WEIGHTS) as temporary:
        temporary.write_bytes(body)
    write_json(directory / CONFIG, config)


def load(source: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Build a saved model from registered names and load its weights strictly, in evaluation mode.

    `source` is a directory that a run saved into. Nothing in it is executed, and no other file is opened. The random state is
    unchanged, and other threads may build modules at the same time. Raises `CheckpointError` for files that are missing, damaged or
    foreign and `MissingPluginError` for a plugin that is not installed; warns with `VersionWarning` if another version of
    it is installed.
    """
    directory = Path(source)
    config = _read_config(directory)
    weights = _open_weights(directory, config)
    size, count = weights.size, len(weights.shapes)
    parts = [_Part(directory, name, data) for name, data in config["modules"].items()]
    with architecture_only(max(LEAST_LARGEST, size)):
        limit = MemoryLimit.of_saved(size, count, plan=True)
        planned = {part.name: part.build(limit) for part in parts}
        _check_state(weights, planned, parts)  # this is cheap, so it comes before gigabytes are read
        weights.verify()
        limit = MemoryLimit.of_saved(size, count)
        modules = {part.name: part.build(limit) for part in parts}
    _check_state(weights, modules, parts)
    for name, module in modules.items():
        with weights.tensors() as tensors:
            module.load_state_dict({key: tensors.get_tensor(f"{name}.{key}") for key in module.state_dict()}, strict=True)
    return Model(modules, config).to(device).eval()


def check(directory: str | Path) -> dict[str, Any]:
    """The config of a saved model whose two files are complete and belong together; nothing is built.

    Raises `CheckpointError` for files that are missing, damaged or foreign.
    """
    config = _read_config(Path(directory))
    _open_weights(Path(directory), config).verify()
    return config


class _Part:
    """One module of a saved model, as its config describes it.

    Raises `CheckpointError` for an invalid Spec, and `MissingPluginError`.
    """

    def __init__(self, directory: Path, name: str, data: Any) -> None:
        self.name, self.where = name, f"{directory / CONFIG}: module {name!r}"
        try:
            self.spec = spec = Spec.from_json(data)
        except UsageError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        if not _is_free(name):
            raise CheckpointError(f"{self.where} has a name that no attribute of a model can have")
        if spec.kind not in KINDS:
            raise CheckpointError(
                f"{self.where} is of kind {spec.kind!r:.40}; a saved model is built from {', '.join(KINDS)}"
            )
        self.component, self.fix = f"the {spec.kind} {spec.name!r}", ""
        saved, installed = data.get("version"), version_of(spec.distribution)
        exact = isinstance(saved, str) and VERSION.fullmatch(saved)
        pin = f"pip install '{spec.distribution}=={saved}'" if exact else f"pip install '{spec.distribution}'"
        if spec.distribution == ADDED:
            return
        if installed is None:
            version = f" {saved}" if exact else ""
            raise MissingPluginError(
                f"{self.where} is {self.component} of {spec.distribution}{version}, which is not installed: {pin}"
            )
        if installed != saved:
            difference = f"saved with {spec.distribution} {saved!s:.40}, installed is {installed}"
            warnings.warn(f"{self.where} was {difference}", VersionWarning, stacklevel=5)
            self.fix = f"; {name!r} was {difference}: {pin}"

    def build(self, limit: MemoryLimit) -> Any:
        """The module. If `limit` is a plan, the module is on the meta device, or None if it cannot be built there."""
        try:
            if limit.plan:
                return plan(self.spec.build, limit)
            with limit:
                module = self.spec.build()
        except UnknownNameError as error:
            if self.spec.distribution == ADDED:
                raise MissingPluginError(
                    f"{self.where} was added by hand as {self.component}: call "
                    f"vitkit.REGISTRIES[{self.spec.kind!r}].add({self.spec.name!r}, ...) with the same class before loading"
                ) from None
            raise CheckpointError(f"{self.where} cannot be built: {error}{self.fix}") from None
        except Exception as error:  # a plugin's factory may raise anything
            message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.where} cannot be built: {limit.exceeded or message}{self.fix}") from error
        if not isinstance(module, nn.Module):
            raise CheckpointError(
                f"{self.where}: {self.component} is no torch module but a {type(module).__name__}{self.fix}"
            )
        return module


def _is_free(name: str) -> bool:
    """Whether a module of a model can have this name: `Model` has no other attribute of this name."""
    empty = Model({}, {"classes": [], "preprocessing": {}})
    return (
        len(name) <= MAX_NAME_CHARACTERS
        and name.isidentifier()
        and not keyword.iskeyword(name)
        and not hasattr(empty, name)
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        reason = "that is a file" if directory.exists() else "no such directory"
        raise CheckpointError(f"no model at {directory}: {reason}; give a directory that a run saved into")
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
    types = {"modules": dict, "preprocessing": dict, "classes": list, "arguments": dict, "weights": dict}
    for key, kind in types.items():
        if not isinstance(config.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} should be a {kind.__name__}, is {config.get(key)!r:.60}")
    if not all(isinstance(name, str) for name in config["classes"]):
        raise CheckpointError(f"{path}: 'classes' should be a list of names, is {config['classes']!r:.60}")
    if len(config["modules"]) > MAX_MODULES:
        raise CheckpointError(f"{path} has {len(config['modules']):,} modules; a saved model has at most {MAX_MODULES}")
    try:
        if config["preprocessing"]:
            channels, height, width = Preprocessing.from_json(config["preprocessing"]).shape
            if min(channels, height, width) < 1 or max(channels, height, width) > MAX_PIXELS:
                raise UsageError(
                    f"preprocessing has the shape ({channels:.3g}, {height:.3g}, {width:.3g}); expected 1 to {MAX_PIXELS:,} each"
                )
    except (UsageError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _open_weights(directory: Path, config: Mapping[str, Any]) -> TensorFile:
    recorded = config["weights"]
    return TensorFile(directory / WEIGHTS, recorded.get("bytes"), recorded.get("sha256"), CONFIG)


def _check_state(weights: TensorFile, modules: Mapping[str, Any], parts: list[_Part]) -> None:
    """`CheckpointError` if the saved tensors are not exactly those of the modules; nothing if a module is only planned."""
    built = {name: state_shapes(module) for name, module in modules.items()}
    expected: Shapes = {
        f"{name}.{key}": value for name, state in built.items() if state is not None for key, value in state.items()
    }
    unknown = tuple(f"{name}." for name, state in built.items() if state is None)
    fix = "".join(part.fix for part in parts)
    missing = sorted(expected.keys() - weights.shapes.keys())
    extra = sorted(key for key in weights.shapes.keys() - expected.keys() if not key.startswith(unknown))
    if missing or extra:
        raise CheckpointError(
            f"{weights.path} does not fit its config: lacks {_some(missing)}; does not belong: {_some(extra)}{fix}"
        )
    for key, (shape, dtype) in expected.items():
        saved_shape, saved_dtype = weights.shapes[key]
        # Older models saved some parameters with 0 dimensions: see `load_scalars`.
        if shape != saved_shape and (shape, saved_shape) != ((1,), ()):
            raise CheckpointError(f"{weights.path}: {key} has the shape {saved_shape}, its config builds {shape}{fix}")
        if dtype != saved_dtype:
            raise CheckpointError(f"{weights.path}: {key} is {saved_dtype}, its config builds {dtype}{fix}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


__all__ = ["ArchitectureWarning", "VersionWarning", "check", "load", "save"]
