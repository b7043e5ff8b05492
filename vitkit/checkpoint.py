"""Saved models: `model.safetensors` beside a `config.json` that says from which registered names to build them."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vitkit.errors import ArgumentsError, CheckpointError, MissingPluginError, UnknownNameError, UsageError
from vitkit.files import atomic_write, write_json
from vitkit.registry import ADDED, Spec, version_of

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CONFIG_BYTES = 4 * 2**20
"""A config is a page of JSON; more is no config of ours."""
DEPTH = 32


class VersionWarning(UserWarning):
    """A saved model was built with another version of a plugin than the one installed."""


class Model(nn.Module):
    """A loaded model: its saved modules as attributes, and what is needed to use them.

    `config` is `config.json`, `classes` the class names, `preprocessing` what `preprocess` does.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = list(modules)
        for name, module in modules.items():
            self.add_module(name, module)
        self.config = dict(config)
        self.classes: list[str] = list(config["classes"])
        self.preprocessing: dict[str, Any] = dict(config["preprocessing"])

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 `(n c h w)` in [0, 255] → float as in training: sized and normalised.

        Raises `UsageError` for another type or number of channels, or where the model was saved without preprocessing.
        """
        from vitkit.data import Preparation

        if not self.preprocessing:
            raise UsageError("this model was saved without preprocessing; normalise images as its training did")
        prepare = Preparation.from_json(self.preprocessing)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != prepare.shape[0]:
            raise UsageError(
                f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (n, {prepare.shape[0]}, h, w)"
            )
        return prepare.normalise(prepare.pixels(images))

    def encode_image(self, images: Tensor) -> Tensor:
        """Preprocessed images `(n c h w)` → the backbone's pooled features `(n d)`."""
        return encode_image(getattr(self, "backbone", None), images)


def encode_image(backbone: Any, images: Tensor) -> Tensor:
    """Pooled features `(b d)`: a backbone's own `encode_image`, or the mean over its tokens `(b n d)`."""
    if backbone is None:
        raise UsageError("this model was saved without a module named 'backbone'")
    encode = getattr(backbone, "encode_image", None)
    if encode is not None:
        features: Tensor = encode(images)
        return features
    tokens: Tensor = backbone(images)
    return tokens.mean(dim=1)


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
    new weights is noticed when loading. Raises `UsageError` for a module without a Spec and `RunError` where the disk
    refuses.
    """
    directory = Path(directory)
    specs, tensors = {}, {}
    for name, module in modules.items():
        spec = getattr(module, "spec", None)
        if not isinstance(spec, Spec):
            raise UsageError(
                f"module {name!r} ({type(module).__name__}) was not built by a registry, so no one could build it again; "
                f"register it and use e.g. heads.build(...), or heads.add(...) in a notebook"
            )
        if not name.isidentifier():
            raise UsageError(f"a module is saved under a Python name; given {name!r}")
        specs[name] = spec.to_json()
        for key, value in module.state_dict().items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous().clone()
    body = to_bytes(tensors, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "library": "vitkit",
        "version": version_of("vitkit"),
        "modules": specs,
        "preprocessing": dict(preprocessing),
        "classes": list(classes),
        "arguments": dict(arguments),
        **(extra or {}),
        "weights": {"file": WEIGHTS, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()},
    }
    with atomic_write(directory / WEIGHTS) as temporary:
        temporary.write_bytes(body)
    write_json(directory / CONFIG, config)


def load(source: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Rebuild a saved model from its names and load its weights strictly, in evaluation mode.

    `source` is a directory that a run saved into. Nothing in it is executed: only registered names are built, with
    arguments checked against their signatures, and tensors are read from safetensors. Raises `CheckpointError` for
    files that are missing, damaged or foreign, `MissingPluginError` for a plugin that is not installed.
    """
    directory = Path(source)
    config = _read_config(directory)
    modules = {name: _build(directory, name, data) for name, data in config["modules"].items()}
    tensors = _read_weights(directory, config["weights"])
    _check_keys(directory, modules, tensors)
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own, strict=True)
    return Model(modules, config).to(device).eval()


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"no model at {directory}: no such directory; give a directory that a run saved into")
    path = directory / CONFIG
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a vitkit config is no longer than a few pages")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no {CONFIG}: no model was saved there, or its run has not ended") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {type(error).__name__}: {str(error) or 'nested too deeply'}") from None
    if not isinstance(config, dict) or config.get("library") != "vitkit" or _depth(config) > DEPTH:
        raise CheckpointError(f"{path} is no vitkit config: expected an object with \"library\": \"vitkit\"")
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {config.get('format')!r}, this vitkit reads {FORMAT}; pip install --upgrade vitkit"
        )
    wanted = {"modules": dict, "preprocessing": dict, "classes": list, "weights": dict}
    for key, kind in wanted.items():
        if not isinstance(config.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} should be a {kind.__name__}, is {config.get(key)!r:.60}")
    return config


def _depth(value: Any) -> int:
    """How deeply dicts and lists are nested, counted without recursion."""
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(child, level + 1) for child in children]
    return deepest


def _build(directory: Path, name: str, data: Any) -> nn.Module:
    where = f"{directory / CONFIG}: module {name!r}"
    try:
        spec = Spec.from_json(data)
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if not name.isidentifier():
        raise CheckpointError(f"{where} is no Python name")
    saved, here = data.get("version"), version_of(spec.distribution)
    what = f"{spec.kind} {spec.name!r}"
    if here is None and spec.distribution != ADDED:
        pin = f"{spec.distribution}=={saved}" if saved else spec.distribution
        raise MissingPluginError(
            f"{where} is the {what} of {spec.distribution} {saved}, which is not installed: pip install '{pin}'"
        )
    versions = f"saved with {spec.distribution} {saved}, installed is {here}"
    differs = spec.distribution != ADDED and saved != here
    if differs:
        warnings.warn(f"{where} was {versions}", VersionWarning, stacklevel=3)
    try:
        module = spec.build()
    except (UnknownNameError, ArgumentsError) as error:
        if spec.distribution == ADDED:
            raise MissingPluginError(
                f"{where} was added by hand as the {what}: call vitkit.REGISTRIES[{spec.kind!r}].add({spec.name!r}, ...) "
                f"with the same class before loading"
            ) from None
        mend = f"; {versions}: pip install '{spec.distribution}=={saved}'" if differs else ""
        raise CheckpointError(f"{where} cannot be built: {error}{mend}") from None
    except UsageError as error:
        raise CheckpointError(f"{where} cannot be built: {error}") from None
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{where}: the {what} is no torch module but {type(module).__name__}")
    return module


def _read_weights(directory: Path, recorded: Mapping[str, Any]) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    again = "copy or download the whole directory again"
    try:
        size = path.stat().st_size
        if size != recorded.get("bytes"):
            raise CheckpointError(f"{path} has {size} bytes, its config says {recorded.get('bytes')}: cut short or foreign; {again}")
        body = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; {again}") from None
    try:
        tensors = read_tensors(body)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file ({error}); {again}") from None
    if hashlib.sha256(body).hexdigest() != recorded.get("sha256"):
        raise CheckpointError(f"{path} is not the file that was saved: its SHA-256 differs from the config's; {again}")
    return tensors


def _check_keys(directory: Path, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    path = directory / WEIGHTS
    wanted = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or foreign:
        raise CheckpointError(f"{path} does not fit its config: lacks {_some(missing)}; does not belong: {_some(foreign)}")
    for key, value in wanted.items():
        if value.shape != tensors[key].shape:
            raise CheckpointError(
                f"{path}: {key} has the shape {tuple(tensors[key].shape)}, its config builds {tuple(value.shape)}"
            )
        if value.dtype != tensors[key].dtype:
            raise CheckpointError(f"{path}: {key} is {tensors[key].dtype}, its config builds {value.dtype}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


__all__ = ["Model", "VersionWarning", "encode_image", "load", "save"]
