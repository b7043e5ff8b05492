"""Training steps of LeJEPA on ViT 192/6/3 at 65 tokens: vitkit beside timm's ViT with lightly's loss.

    python tests/benchmarks/jepa_step.py [--samples 128] [--rounds 7] [--threads 2] [--compiled]

A step takes two views of each sample, CLS and 64 patches a view, through the encoder and a projection to 64
dimensions, the loss with 256 directions, the backward pass and AdamW. Both sides start from the same weights. They
take turns in one process, so that a machine's better and worse minutes fall on both, and the table gives medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from lightly.loss import LeJEPALoss as LightlyLeJEPALoss
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitkit_jepa import LeJEPALoss
from vitkit_vit import ViT

VIEWS, DIRECTIONS = 2, 256
Step = Callable[[], float]


def vitkit_step(images: Tensor, *, bf16: bool, compiled: bool = False) -> Step:
    model = nn.Sequential(_Pooled(ViT(depth=6, dropout=0.0)), nn.Linear(192, 64))
    loss = LeJEPALoss(directions=DIRECTIONS)
    if compiled:
        model.compile(dynamic=False)
    return _step(model, lambda views: loss(views)["loss"], images, bf16)


def timm_step(images: Tensor, *, bf16: bool) -> Step:
    vit = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=0, global_pool="token"
    )
    torch.manual_seed(0)
    vit.load_state_dict(ViT(depth=6, dropout=0.0).state_dict())
    loss = LightlyLeJEPALoss(sigreg_num_vectors=DIRECTIONS)
    # lightly computes over local and global views together: one of each is the two views, each once.
    return _step(
        nn.Sequential(vit, nn.Linear(192, 64)),
        lambda views: loss(local_proj=views[1:], global_proj=views[:1]),
        images,
        bf16,
    )


class _Pooled(nn.Module):
    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.encode_image(images)


def _step(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, bf16: bool) -> Step:
    """A call that takes one training step and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            projections = model(images)  # (v·n k)
        value = loss(projections.float().unflatten(0, (VIEWS, -1)))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="samples a step, two views each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also vitkit under torch.compile")
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    images = torch.randn(VIEWS * given.samples, 3, 32, 32)
    steps = {
        "timm + lightly, fp32": timm_step(images, bf16=False),
        "timm + lightly, bf16 autocast": timm_step(images, bf16=True),
        "vitkit, fp32": vitkit_step(images, bf16=False),
        "vitkit, bf16 autocast": vitkit_step(images, bf16=True),
    }
    if given.compiled:
        steps["vitkit, bf16 autocast, compiled"] = vitkit_step(images, bf16=True, compiled=True)
    for step in steps.values():  # warm-up, and compiling
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(given.rounds), "rounds", transient=True):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fp32, bf16, *_ = medians.values()
    table = Table(title=f"{given.samples} samples, {VIEWS} views each, {given.threads} threads, {given.rounds} rounds")
    for column in ("", "views/s", "slowest … fastest", "× timm fp32", "× timm bf16"):
        table.add_column(column, justify="right" if column else "left")
    views = len(images)
    for name, median in medians.items():
        span = f"{views / max(seconds[name]):.0f} … {views / min(seconds[name]):.0f}"
        table.add_row(name, f"{views / median:.0f}", span, f"{fp32 / median:.2f}", f"{bf16 / median:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
