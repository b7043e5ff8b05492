"""A training step of the zoo's backbones and of timm's models with weights of the same shapes, forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vitkit_zoo import PVT, ConvNeXt, MobileViT, Swin

from .timing import Options, Row, in_turn, times

WIDTHS, DEPTHS = [32, 64, 128, 256], [2, 2, 2, 2]
HEADS, MLP_RATIOS = [1, 2, 4, 8], [4, 4, 4, 4]


def pairs() -> dict[str, tuple[nn.Module, nn.Module, int, int]]:
    """For each backbone: ours, timm's, the side of the images and their number."""
    torch.manual_seed(0)
    windows = {"embed_dim": 32, "depths": (2, 2, 2), "num_heads": (2, 4, 8)}
    stages: dict[str, Any] = {"depths": DEPTHS, "num_heads": HEADS, "mlp_ratios": MLP_RATIOS}
    return {
        "swin": (
            Swin(img_size=32, preset="tiny_32"),
            SwinTransformer(img_size=32, patch_size=2, window_size=4, num_classes=0, drop_path_rate=0.0, **windows), 32, 64,
        ),
        "convnext": (
            ConvNeXt(img_size=64, patch_size=4, depths=DEPTHS, widths=WIDTHS),
            TimmConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=0), 64, 64,
        ),
        "pvt": (
            PVT(img_size=64, preset="b0", widths=WIDTHS, **stages),
            PyramidVisionTransformerV2(embed_dims=WIDTHS, num_classes=0, **stages), 64, 32,
        ),
        "mobilevit": (MobileViT(img_size=64, preset="xxs"), timm.create_model("mobilevit_xxs", num_classes=0), 64, 32),
    }  # fmt: skip


def step(features: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, bf16: bool) -> Callable[[], None]:
    """A forward and a backward pass."""

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = features(x)
        output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def rows(options: Options) -> Iterator[Row]:
    for name, (ours, theirs, side, count) in pairs().items():
        x = torch.randn(4 if options.quick else count, 3, side, side)
        calls: Any = {}
        for bf16 in (False, True):
            calls["vitkit" + " bf16" * bf16] = step(ours.train(), ours, x, bf16)
            calls["timm" + " bf16" * bf16] = step(theirs.train().forward_features, theirs, x, bf16)
        seconds = in_turn(calls, options.rounds, options.clock)
        rate = f"{len(x) / min(seconds['vitkit']):.0f} images/s"
        fp32, half = (times(seconds, "timm" + suffix, "vitkit" + suffix) for suffix in ("", " bf16"))
        yield Row("zoo", f"training step: {name}, {side}×{side}", rate, fp32, f"{half}, bf16", peer="timm's model", wanted="≥ 1")
