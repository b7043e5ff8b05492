"""Weights of other libraries for a backbone: vision transformers of timm, DINO, DINOv2, MAE, DeiT and Hugging Face."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitkit.errors import CheckpointError, UsageError, nearest, printable
from vitkit.models.published import check_loaded, fitted, offering, renamed

CONTAINERS = (
    "model_ema", "teacher", "target_encoder", "state_dict", "model_state_dict", "model", "module", "student", "encoder", "backbone",
)  # fmt: skip
"""Entries of a training checkpoint that may hold the model, in the order of preference: averaged weights come first."""
PATCH = "patch_embed.proj.weight"
NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^(embeddings\.)?register_tokens$", "reg_token"),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 stores its blocks in chunks
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(1|2)\.lambda1$", r".ls\1.gamma"),
    (r"^(layernorm|layer_norm)\.", "norm."),
)
"""Patterns of names in other libraries, with the names in timm and vitkit; applied in this order."""


@dataclass(frozen=True)
class LoadedWeights:
    """The result of `load_weights`, by the names of tensors.

    - `loaded`: tensors of the backbone that now hold the file's values.
    - `changed`: a line for each loaded tensor whose values were resampled, summed over channels, or multiplied by a layer scale.
    - `missing`: tensors of the backbone that the file does not have; they keep their values.
    - `unused`: a line for each tensor of the file that is not in the backbone now, with the reason.
    """

    file: Path
    loaded: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.file}: {len(self.loaded)} tensors loaded"]
        for title, names in (("changed", self.changed), ("kept, not in the file", self.missing), ("not loaded", self.unused)):
            lines += [f"  {title}: {printable(name)}" for name in names]
        return "\n".join(lines)


def load_weights(backbone: nn.Module, file: str | Path, *, key: str | None = None) -> LoadedWeights:
    """Load a state dict of another library into a backbone, in place, and report what did not fit.

    `file` is a safetensors file, or a `.pth`, `.pt` or `.bin` file that `torch.load(weights_only=True)` reads. Its tensors are named as
    by timm, DINO, DINOv2, MAE, DeiT or Hugging Face's ViT, DeiT, ViT-MAE and DINOv2 models. `key` names the entry of a training
    checkpoint that holds the model (default: the first of an averaged model, a teacher, a model).

    Some tensors of another shape are adapted: position embeddings by bicubic interpolation with antialiasing; the patch embedding by
    the pseudo-inverse of the same interpolation (Beyer et al., FlexiViT, arXiv 2212.08013), its channels by their sum or by repeating them;
    query, key and value are joined; layer scales are multiplied into the layer before them where the backbone has none. Positions are zero
    for tokens that have none in the file. All others are not loaded.

    A backbone that is no plain vision transformer offers the names of its published weights, and what happens to tensors of another
    shape: see `vitkit.models.published`.

    Raises `CheckpointError` for a file that cannot be read without running code, `UsageError` for a backbone without a patch embedding
    and if no block fits.
    """
    path = Path(file)
    target = backbone.state_dict()
    offer = offering(backbone)
    if offer is not None:
        return _load_published(backbone, *offer, path, _state_dict(path, key))
    prefixes = [name.removesuffix(PATCH) for name in target if name.endswith(PATCH)]
    if len(prefixes) != 1:
        raise UsageError(f"{type(backbone).__name__} has {len(prefixes)} patch embeddings named '{PATCH}'; expected a vision transformer")
    prefix = prefixes[0]
    vit = backbone.get_submodule(prefix.rstrip(".")) if prefix else backbone
    state, names, unused = _in_timm_names(_state_dict(path, key))
    vit_target = {name.removeprefix(prefix): value for name, value in target.items() if name.startswith(prefix)}
    changed = _adapt(state, vit_target, vit)
    report = LoadedWeights(path, changed=[f"{prefix}{line}" for line in changed])
    for name, value in state.items():
        if name in vit_target and vit_target[name].shape == value.shape:
            report.loaded.append(prefix + name)
            continue
        reason = f"the backbone has {tuple(vit_target[name].shape)}" if name in vit_target else "the backbone has none"
        unused += [f"{source} {tuple(value.shape)}: {reason}" for source in names[name]]
    if not any(name.startswith(f"{prefix}blocks.") for name in report.loaded):
        raise UsageError(
            f"no block of {printable(path)} fits this backbone: {printable('; '.join(sorted(unused)[:3]))}; build the backbone with the "
            f"file's embed_dim, depth and num_heads"
        )
    with torch.no_grad():
        for name in report.loaded:
            target[name].copy_(state[name.removeprefix(prefix)])
    report.missing.extend(sorted(target.keys() - set(report.loaded)))
    report.unused.extend(sorted(unused))
    return report


def _load_published(backbone: nn.Module, prefix: str, module: Any, path: Path, state: Mapping[str, Tensor]) -> LoadedWeights:
    """Load the tensors whose names and shapes `module`, the part of the backbone named `prefix`, knows to change into its own."""
    target, inner = backbone.state_dict(), module.state_dict()
    names, beside = renamed(module, state)
    unused = [f"{source} {tuple(state[source].shape)}: not part of the model" for source in beside]
    values, changed = {}, []
    for source, name in names.items():
        value, shape = state[source], tuple(state[source].shape)
        fit, change = fitted(module, name, value, inner[name], fit_channels) if name in inner else (None, "")
        if fit is None:
            reason = f"the backbone has {tuple(inner[name].shape)}" if name in inner else "the backbone has none"
            unused.append(f"{source} {shape}: {reason}")
            continue
        full_name = f"{prefix}.{name}" if prefix else name
        values[full_name] = fit
        changed += [f"{full_name} {shape} → {tuple(fit.shape)}: {change}"] if change else []
    check_loaded(path, list(values), unused, target)
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
    return LoadedWeights(path, list(values), changed, sorted(target.keys() - values.keys()), sorted(unused))


def _state_dict(path: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors of a file by name; those of a training checkpoint lie in one of its entries."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {printable(path)}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{printable(path)} is no safetensors file ({error})") from None
    except Exception as error:  # unpickling a damaged or foreign file raises many kinds
        reason = printable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 200)
        raise CheckpointError(
            f"{printable(path)} holds more than tensors, or is damaged ({reason}). Loading other objects would run code of the file. If "
            f"you trust its source, convert it once: safetensors.torch.save_file(torch.load(FILE, weights_only=False)[...], NEW)"
        ) from None
    while isinstance(content, Mapping) and not (key is None and any(isinstance(value, Tensor) for value in content.values())):
        entries = [name for name, value in content.items() if isinstance(value, Mapping)]
        chosen = key if key is not None else next((name for name in CONTAINERS if name in entries), None)
        if chosen not in entries:
            near = nearest(str(chosen), map(str, entries)) if key is not None else ""
            raise UsageError(
                f"{printable(path)} has no entry {printable(repr(key)) if key else 'that is known to hold a model'}{near or ';'} its "
                f"entries: {printable(', '.join(map(str, entries)) or 'none')}; give one as key=..."
            )
        content, key = content[chosen], None
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{printable(path)} holds no tensors by name; expected a state dict of a vision transformer")
    return tensors


def _in_timm_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]], list[str]]:
    """Tensors under timm's names; the names in the file for each; and a line for each tensor beside the vision transformer."""
    patch = re.compile(r"(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight$")
    prefixes = sorted({patch.sub("", name) for name in state if patch.search(name)}, key=lambda name: ("teacher" not in name, name))
    if not prefixes:
        raise UsageError(f"the file holds no patch embedding; its first tensors: {printable(', '.join(sorted(state)[:5]))}")
    renamed: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    unused = []
    for source, value in state.items():
        if not source.startswith(prefixes[0]):
            unused.append(f"{source} {tuple(value.shape)}: not part of the vision transformer {prefixes[0]!r}")
            continue
        name = source.removeprefix(prefixes[0])
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
        names[name] = [source]
    for name in [name for name in renamed if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if parts[2] not in renamed:
            continue
        query = renamed[name]
        joined = torch.cat([query, renamed.get(parts[1], torch.zeros_like(query)), renamed[parts[2]]])  # DINOv3 has no bias of keys
        both = name.replace(".attn.q.", ".attn.qkv.")
        renamed[both], names[both] = joined, [source for part in parts for source in names.get(part, [])]
        for part in parts:
            renamed.pop(part, None)
            names.pop(part, None)
    return renamed, names, unused


def _adapt(state: dict[str, Tensor], target: Mapping[str, Tensor], vit: nn.Module) -> list[str]:
    """Change the file's tensors so that they fit the backbone's; a line for each."""
    lines = []

    def replace(name: str, value: Tensor, how: str) -> None:
        lines.append(f"{name} {tuple(state[name].shape)} → {tuple(value.shape)}: {how}")
        state[name] = value

    for name in [name for name in state if re.search(r"\.ls[12]\.gamma$", name) and name not in target]:
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        if f"{layer}.weight" in state and f"{layer}.weight" in target:
            gamma = state.pop(name)
            for part in ("weight", "bias"):
                if f"{layer}.{part}" in state:
                    value = state[f"{layer}.{part}"]
                    replace(f"{layer}.{part}", value * gamma.view(-1, *[1] * (value.ndim - 1)), f"multiplied by {name}")
    if PATCH in state and state[PATCH].ndim == target[PATCH].ndim == 4:
        weight, wanted = state[PATCH], target[PATCH].shape
        if weight.shape[1] != wanted[1]:
            replace(PATCH, fit_channels(weight, wanted[1]), "channels summed" if wanted[1] == 1 else "channels repeated")
        if state[PATCH].shape[2:] != wanted[2:]:
            replace(PATCH, resample_patches(state[PATCH], (wanted[2], wanted[3])), "resampled")
    extra = [state.pop(name) for name in ("dist_token", "reg_token") if name in state and "reg_token" in target]
    registers = sum(token.shape[1] for token in extra)
    if extra:
        state["reg_token"] = torch.cat(extra, dim=1)
    if "pos_embed" in state and "pos_embed" in target:
        prefix = {"cls": "cls_token" in state, "dist": "dist_token" in state, "registers": registers}
        positions = _positions(state["pos_embed"], target, vit, prefix)
        if positions is not None and not (positions.shape == state["pos_embed"].shape and positions.equal(state["pos_embed"])):
            replace("pos_embed", positions, "resampled, or set to zero for tokens without positions")
    return lines


def _positions(source: Tensor, target: Mapping[str, Tensor], vit: Any, prefix: Mapping[str, int]) -> Tensor | None:
    """Position embeddings `(1 n d)` for the backbone's tokens: CLS, registers and patches. None if the file's grid is not known."""
    grid = getattr(vit, "grid_size", None) or getattr(getattr(vit, "patch_embed", None), "grid_size", None)
    if grid is None or source.ndim != 3 or source.shape[2] != target["pos_embed"].shape[2]:
        return None
    places = target["pos_embed"].shape[1] - grid[0] * grid[1]  # of CLS and registers
    tokens = prefix["cls"] + prefix["dist"] + prefix["registers"]
    for count in sorted({tokens, tokens - prefix["registers"], 0}, reverse=True):
        side = round((source.shape[1] - count) ** 0.5)
        if side > 0 and side * side == source.shape[1] - count:
            break
    else:
        return None
    special, patches = source[:, :count], resample_positions(source[:, count:], (side, side), grid)
    rows = source.new_zeros(1, places, source.shape[2])
    has_cls = int("cls_token" in target)
    if places and count:
        taken = special[:, : 1 if prefix["cls"] else 0] if has_cls else special[:, :0]
        others = special[:, int(prefix["cls"]) :] if "reg_token" in target else special[:, :0]
        first = torch.cat([taken, others], dim=1)[:, :places]
        rows[:, : first.shape[1]] = first
    return torch.cat([rows, patches], dim=1)


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings of a grid `(1 h·w d)` → those of another grid, by bicubic interpolation with antialiasing.

    Source: `timm.layers.resample_abs_pos_embed`, which gives the same values.
    """
    if tuple(old) == tuple(new):
        return positions
    grid = positions.float().unflatten(1, old).permute(0, 3, 1, 2)  # (1 d h w)
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", antialias=True, align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)


def resample_patches(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A patch embedding `(d c h w)` → one of patches of another size `(d c *size)`.

    With B the matrix of bicubic interpolation between the sizes, the new weights are pinv(B)·w: a patch that is enlarged has the same
    embedding. Source: Beyer et al., FlexiViT, arXiv 2212.08013; `timm.layers.resample_patch_embed`.
    """
    height, width = weight.shape[2:]
    pixels = torch.eye(height * width).unflatten(1, (1, height, width))  # one image for each pixel
    matrix = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).flatten(1)  # (old new)
    return (weight.float().flatten(2) @ torch.linalg.pinv(matrix).T).unflatten(2, size).to(weight.dtype)


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch embedding `(d c h w)` for another number of channels: their sum for one, else repeated and scaled by c/`channels`.

    Source: `timm.models.adapt_input_conv`.
    """
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    old = weight.shape[1]
    return weight.repeat(1, -(-channels // old), 1, 1)[:, :channels] * (old / channels)


__all__ = ["LoadedWeights", "load_weights", "resample_patches", "resample_positions"]
