"""What evaluating costs: label retrieval beside plain forward passes, probes of many features, and SIGReg beside a step.

ViT 192/6/3, 32×32 images in patches of 4, bf16. The probes' features are drawn, 60,000 and 10,000 of 192 dimensions in ten
classes that overlap. kNN's peer is lightly's `knn_predict`, the linear probe's scikit-learn's `LogisticRegression`.
"""

import statistics

import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict
from sklearn.linear_model import LogisticRegression

from vitkit import backbones, evaluators, heads, losses
from vitkit.data import Stored, from_store
from vitkit.models import Features
from vitkit_jepa import JEPA

from .timing import Options, Row, in_turn, share, times

K, TEMPERATURE = 20, 0.07


def jepa() -> JEPA:
    torch.manual_seed(0)
    backbone = backbones.build("multimodal_vit", num_classes=10)
    torch.nn.init.normal_(backbone.label_embed.weight)
    return JEPA(backbone, heads.build("mlp", in_dim=192, out_dim=64), losses.build("lejepa", directions=256))


def retrieval(model: JEPA, options: Options) -> Row:
    """M1 and M2 encode each image once alone and once with each label: eleven passes."""
    count = 50 if options.quick else 250
    pixels = torch.randint(0, 256, (count, 1, 32, 32), dtype=torch.uint8)
    labels = torch.arange(count) % 10
    tensors = {f"{split}.{what}": value for split in ("train", "test") for what, value in (("images", pixels), ("labels", labels))}
    data = from_store(Stored("made up", [str(label) for label in range(10)], tensors))
    evaluator = evaluators.build("label_retrieval", attention_samples=0)

    def plain() -> None:
        for _ in range(11):
            for batch in data.test.batches(500).epoch(0):
                model.backbone.encode_image(batch["images"])

    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        seconds = in_turn({"vitkit": lambda: evaluator(model, data), "plain": plain}, options.rounds, options.clock)
    rate = f"{11 * count / statistics.median(seconds['vitkit']):,.0f} passes/s"
    return Row(
        "JEPA", "evaluation: M1 and M2", rate, ceiling=share(seconds, "plain", "vitkit"), wanted="≥ 80 %",
        peer="plain forward passes are the ceiling",
    )  # fmt: skip


def sigreg(model: JEPA, options: Options) -> Row:
    """A step of samples of two views, forward and backward, beside SIGReg's own on its projections."""
    count = 32 if options.quick else 128
    images, labels = torch.randn(count, 2, 1, 32, 32), torch.arange(count) % 10
    projections = torch.randn(2, count, 64, requires_grad=True)
    regulariser = losses.build("sigreg", directions=256)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model({"images": images, "labels": labels})["loss"].backward()

    model.train()
    calls = {"step": step, "sigreg": lambda: regulariser(projections)["loss"].backward()}
    seconds = in_turn(calls, options.rounds, options.clock)
    part = f"{1e3 * statistics.median(seconds['sigreg']):.1f} ms, {share(seconds, 'sigreg', 'step', 1)} of a step"
    return Row("JEPA", "SIGReg, 256 directions", part, wanted="< 3 %")


def probes(options: Options) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 192, generator=generator)

    def drawn(count: int) -> Features:
        labels = torch.arange(count) % 10
        return Features(0.4 * centres[labels] + torch.randn(count, 192, generator=generator), labels)

    parts = 10 if options.quick else 1
    train, test = drawn(60_000 // parts), drawn(10_000 // parts)
    classes = [str(label) for label in range(10)]

    def lightly() -> None:
        bank = F.normalize(train.features, dim=1).T.contiguous()
        for chunk in F.normalize(test.features, dim=1).split(512):
            knn_predict(chunk, bank, train.labels, 10, knn_k=K, knn_t=TEMPERATURE)

    def sklearn() -> None:
        LogisticRegression(max_iter=1000).fit(train.features.numpy(), train.labels.numpy()).score(
            test.features.numpy(), test.labels.numpy()
        )

    found, total = [], 0.0
    kinds = {
        "linear_probe": ("linear probe", {}, sklearn, "scikit-learn's LogisticRegression"),
        "knn": ("kNN", {"k": K, "temperature": TEMPERATURE}, lightly, "lightly's knn_predict"),
    }
    for name, (title, arguments, other, peer) in kinds.items():
        evaluator = evaluators.build(name, **arguments)
        calls = {"vitkit": lambda evaluator=evaluator: evaluator.score(train, test, classes), "documented": other}
        seconds = in_turn(calls, 1 if options.quick else 2, options.clock, warm_up=0)
        took = statistics.median(seconds["vitkit"])
        total += took
        what = f"evaluation: {title}, {len(train.labels):,} + {len(test.labels):,}"
        found.append(Row("JEPA, VAE", what, f"{took:.1f} s", times(seconds, "documented"), peer=peer))
    return [*found, Row("JEPA, VAE", "evaluation: both", f"{total:.1f} s", wanted="≤ 20 s")]


def rows(options: Options) -> list[Row]:
    model = jepa()
    return [retrieval(model, options), sigreg(model, options), *probes(options)]
