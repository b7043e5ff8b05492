"""What evaluating costs: label retrieval beside plain forward passes, probes of many features, and SIGReg beside a step.

    python tests/benchmarks/evaluation.py [--images 500] [--rounds 5] [--threads 2]

ViT 192/6/3, 32×32 images in patches of 4, bf16. What is compared takes turns in one process, and the table gives medians
of the rounds' ratios: readings of a shared machine move, their ratios hardly do. The probes' features are drawn, 60,000
and 10,000 of 192 dimensions in ten classes that overlap; process time is what they take on a machine that does nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from vitkit import backbones, evaluators, heads, losses
from vitkit.data import Stored, from_store
from vitkit_eval import Features
from vitkit_jepa import JEPA


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def jepa() -> JEPA:
    backbone = backbones.build("multimodal_vit", num_classes=10)
    torch.nn.init.normal_(backbone.label_embed.weight)
    return JEPA(backbone, heads.build("mlp", in_dim=192, out_dim=64), losses.build("lejepa", directions=256))


def retrieval(table: Table, model: JEPA, options: argparse.Namespace) -> None:
    """M1 and M2 encode each image once alone and once with each label: eleven passes."""
    pixels = torch.randint(0, 256, (options.images, 1, 32, 32), dtype=torch.uint8)
    labels = torch.arange(options.images) % 10
    tensors = {f"{split}.{what}": value for split in ("train", "test") for what, value in (("images", pixels), ("labels", labels))}
    data = from_store(Stored("made up", [str(label) for label in range(10)], tensors))
    evaluator = evaluators.build("label_retrieval", attention_samples=0)

    def plain() -> None:
        for _ in range(11):
            for batch in data.test.batches(500).epoch(0):
                model.backbone.encode_image(batch["images"])

    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        times = [(seconds(plain), seconds(lambda: evaluator(model, data))) for _ in range(options.rounds + 1)][1:]
    rates = [11 * options.images / statistics.median(column) for column in zip(*times, strict=True)]
    share = statistics.median(a / b for a, b in times)
    table.add_row("label retrieval, images/s", f"{rates[1]:,.0f}", f"plain passes {rates[0]:,.0f}", f"{share:.0%}", "≥ 80 %")


def sigreg(table: Table, model: JEPA, options: argparse.Namespace) -> None:
    """A step of 128 samples of two views, forward and backward, beside SIGReg's own on its projections."""
    images, labels = torch.randn(128, 2, 1, 32, 32), torch.arange(128) % 10
    projections = torch.randn(2, 128, 64, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model({"images": images, "labels": labels})["loss"].backward()

    model.train()
    regulariser = losses.build("sigreg", directions=256)
    calls = 20
    times = [
        (seconds(step), seconds(lambda: [regulariser(projections)["loss"].backward() for _ in range(calls)]) / calls)
        for _ in range(options.rounds + 1)
    ][1:]
    whole, part = (statistics.median(column) for column in zip(*times, strict=True))
    share = statistics.median(b / a for a, b in times)
    table.add_row("SIGReg, 256 directions, ms", f"{1e3 * part:.1f}", f"training step {1e3 * whole:,.0f}", f"{share:.1%}", "< 3 %")


def probes(table: Table, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 192, generator=generator)

    def drawn(count: int) -> Features:
        labels = torch.arange(count) % 10
        return Features(0.4 * centres[labels] + torch.randn(count, 192, generator=generator), labels)

    train, test, classes = drawn(60_000), drawn(10_000), [str(label) for label in range(10)]
    total = 0.0
    for name in ("linear_probe", "knn"):
        evaluator = evaluators.build(name)
        work = time.process_time()
        wall = seconds(lambda evaluator=evaluator: evaluator.score(train, test, classes))
        work, total = time.process_time() - work, total + wall
        table.add_row(f"{name}, s", f"{wall:.1f}", f"process time {work:.1f}", "", "")
    table.add_row("both probes, s", f"{total:.1f}", "", "", "≤ 20 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("what", "measured", "beside", "share", "wanted", title=f"{options.threads} threads, {options.rounds} rounds")
    model = jepa()
    probes(table, options)
    sigreg(table, model, options)
    retrieval(table, model, options)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
