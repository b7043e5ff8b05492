"""The attention of a transformer's blocks, captured while the backbone computes its tokens.

Attention weights are computed beside the forward pass from the queries and keys that it uses. So the backbone needs no method for this, it
may use fused attention or not, and its tokens are exactly those of a forward pass without the capture. (`nn.TransformerEncoderLayer` has
a path of its own for evaluation, which is not taken during the capture: there the tokens agree up to rounding.)
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitkit.errors import UsageError
from vitkit.models.features import evaluating

SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


@dataclass(frozen=True)
class AttentionMaps:
    """Tokens of images and the attention between them.

    - `tokens` `(b n d)`: the backbone's output. The first `prefix` ones are CLS and registers, the others patches in row-major order.
    - `grid`: rows and columns of patches; rows · columns = n − `prefix`.
    - `heads` `(b h n n)`: the weights of the last block, each row, a query's, sums to one. None if `problem` names a reason.
    - `rollout` `(b n n)`: the rollout over all blocks, whose rows sum to one; None where a block does not attend from all tokens to all.
    - `has_cls`: whether the first token is a CLS token.
    """

    tokens: Tensor
    grid: tuple[int, int]
    prefix: int
    has_cls: bool
    heads: Tensor | None
    rollout: Tensor | None
    problem: str = ""

    def patches(self) -> Tensor:
        """The patch tokens `(b rows·columns d)`."""
        return self.tokens[:, self.prefix :]

    def head_maps(self) -> Tensor:
        """The attention to the patches `(b h rows columns)` in each head of the last block; `UsageError` where there is none.

        Of the CLS token, or the mean over all patches as queries where there is no CLS token.
        """
        if self.heads is None:
            raise UsageError(self.problem)
        return self._to_patches(self.heads)

    def rollout_map(self) -> Tensor:
        """The rollout to the patches `(b rows columns)`, from the queries of `head_maps`; `UsageError` where there is none."""
        if self.rollout is None:
            raise UsageError(self.problem or "attention rollout needs attention between all tokens in every block")
        return self._to_patches(self.rollout)

    def _to_patches(self, weights: Tensor) -> Tensor:
        """Weights `(... n n)` → `(... rows columns)`."""
        queries = weights[..., :1, :] if self.has_cls else weights[..., self.prefix :, :]
        return queries[..., self.prefix :].mean(dim=-2).unflatten(-1, self.grid)


def attention(backbone: nn.Module, images: Tensor) -> AttentionMaps:
    """The tokens of preprocessed images `(b c h w)` and the attention between them, without gradients, in evaluation mode.

    The number of CLS and register tokens is the attribute `num_prefix_tokens` of the backbone or of the first of its modules that has one,
    0 without one; there is a CLS token if that module's `cls_token` is not None. The other tokens are patches in row-major order, unless
    the backbone's `tokens_in_rows` is False. Memory: n² numbers for each head of one block.

    Ranks: no rank waits for another. Raises `UsageError` for a backbone that does not give tokens `(b n d)` in rows, and where n − prefix
    tokens make no grid with the proportions of the image.
    """
    with evaluating(backbone), _Capture() as capture:
        tokens = backbone(images)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != len(images):
        given = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise UsageError(f"{type(backbone).__name__} gave {given} for {len(images)} images; expected tokens (b, n, d)")
    owner: Any = next((module for module in backbone.modules() if isinstance(getattr(module, "num_prefix_tokens", None), int)), None)
    prefix = 0 if owner is None else owner.num_prefix_tokens
    if not getattr(backbone, "tokens_in_rows", True):
        raise UsageError(f"the patch tokens of {type(backbone).__name__} are not in row-major order, so they cannot be drawn over an image")
    grid = _grid(tokens.shape[1] - prefix, (images.shape[-2], images.shape[-1]))
    if grid is None:
        raise UsageError(
            f"{type(backbone).__name__} gives {tokens.shape[1]} tokens, {prefix} of them CLS and registers; the others make no grid "
            f"with the proportions of {images.shape[-2]}×{images.shape[-1]} pixels"
        )
    has_cls = prefix > 0 and getattr(owner, "cls_token", None) is not None
    problem = capture.problem(len(images), tokens.shape[1], type(backbone).__name__)
    # Clones are no inference tensors, so that autograd can use them.
    heads, rollout = (None if problem or value is None else value.clone() for value in (capture.last, capture.rollout))
    return AttentionMaps(tokens.float().clone(), grid, prefix, has_cls, heads, rollout, problem)


def rolled_out(rollout: Tensor | None, weights: Tensor) -> Tensor:
    """The rollout `(b n n)` behind one more block with attention weights `(b h n n)`.

        R ← (A + I)/2 · R,   A = the mean of the weights over heads

    The identity stands for the residual stream. None is the rollout before the first block, the identity. Source: Abnar and Zuidema,
    Quantifying Attention Flow in Transformers, arXiv 2005.00928.
    """
    mean = weights.float().mean(dim=1)
    if rollout is None:
        return (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
    return (mean @ rollout + rollout) / 2


def principal_colours(tokens: Tensor) -> Tensor:
    """Tokens `(... d)` → colours `(... 3)` in [0, 1]: their first three principal components, over all of them together.

    Each component is scaled so that 2 % of the tokens are at 0 and 2 % at 1. Its sign is the one whose largest loading is positive, so
    the same tokens always have the same colours. A component without variance is ½. Raises `UsageError` for fewer than two tokens.

    Source: the figures of DINOv2, arXiv 2304.07193, which first remove the background by a threshold; this function keeps all tokens.
    """
    flat = tokens.detach().flatten(0, -2).cpu().double()
    if len(flat) < 2:
        raise UsageError(f"principal components need at least two tokens; given {len(flat)}")
    centred = flat - flat.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred / len(flat))  # in the order of their variance
    axes = axes.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    components = F.pad(centred @ axes, (0, 3 - axes.shape[1]))
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    flat_components = high - low <= 1e-9 * centred.abs().max().clamp(min=1e-30)
    colours = ((components - low) / (high - low).masked_fill(flat_components, 1.0)).clamp(0, 1)
    return colours.masked_fill(flat_components, 0.5).float().unflatten(0, tokens.shape[:-1])


class _Capture(TorchFunctionMode):
    """Keeps the attention weights of the last block, and the rollout over all blocks, of what is computed within it."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.rollout: Tensor | None = None
        self._alike = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._add(_weights(*args, **kwargs))
        elif func is F.multi_head_attention_forward:  # of `nn.MultiheadAttention`, whose own operations are not seen here
            weights: Any = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})[1]
            self._add(weights.float())
        elif func in SOFTMAX and isinstance(result, Tensor) and result.ndim == 4 and _over_last(args, kwargs):
            self._add(result.float())
        return result

    def _add(self, weights: Tensor) -> None:
        self._alike &= weights.ndim == 4 and weights.shape[2] == weights.shape[3]
        self._alike &= self.last is None or (weights.shape[0], weights.shape[2]) == (self.last.shape[0], self.last.shape[2])
        self.last = weights
        self.rollout = rolled_out(self.rollout, weights) if self._alike else None

    def problem(self, images: int, tokens: int, name: str) -> str:
        """Why the captured weights are not those between `tokens` tokens of each image; empty if they are."""
        if self.last is None:
            return f"{name} computes no attention between tokens, so there are no attention maps; the colours of its tokens remain"
        shape = tuple(self.last.shape)
        if len(shape) == 4 and shape[0] == images and shape[2] == shape[3] == tokens:
            return ""
        windows = len(shape) == 4 and shape[2] == shape[3] and shape[0] > images
        kind = "attends within windows" if windows else "does not attend between all tokens"
        return (
            f"the last block of {name} {kind}: its weights are {shape}, those between all tokens would be "
            f"({images}, heads, {tokens}, {tokens}); so there are no attention maps; the colours of its tokens remain"
        )


def _weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """The weights `(... m n)` that `scaled_dot_product_attention` of the same arguments mixes the values with, without dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1)


def _over_last(args: Any, kwargs: Any) -> bool:
    """Whether a softmax with these arguments runs over the last dimension of four."""
    return kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, 3)


def _grid(patches: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of `patches` square patches of an image of this size; None if there are none."""
    height, width = size
    rows = round((patches * height / width) ** 0.5)
    if rows < 1 or patches % rows:
        return None
    columns = patches // rows
    return (rows, columns) if abs(rows * width - columns * height) < max(size) else None


__all__ = ["AttentionMaps", "attention", "principal_colours", "rolled_out"]
