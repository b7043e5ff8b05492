"""CLIP's training step and its evaluation, beside open_clip's model, loss and retrieval metrics.

The step: 32 pairs (`pair_vit`'s preset "enhanced": ViT 512/6/8 over 32 patches) with captions of twelve words and more,
a text tower of one block of width 128, the contrastive loss, AdamW. As documented, open_clip's tokenizer pads to 77 tokens
of its own vocabulary. Tuned by hand it is bf16 autocast and torch.compile, AdamW fused, texts as short as the longest
caption, and no token that occurs in none.

The evaluation: ranks of pairs against captions, beside the full matrices and sorts of `get_clip_metrics`.
"""

import statistics

import torch
import torch.nn.functional as F
from open_clip import ClipLoss, get_tokenizer
from open_clip.model import CLIP as OpenCLIP
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip_train.train import get_clip_metrics
from torch import Tensor

from vitkit import backbones, heads, losses
from vitkit.training import adamw
from vitkit_clip import CLIP, captions, vocabulary_of
from vitkit_eval import rank_relevant
from vitkit_eval.ranking import hit_rate, mean_average_precision, median_rank

from .timing import Call, Options, Row, compare_steps, in_turn, times, training_step

PAIRS, SHARED = 32, 256
CLASSES = [f"thing {number}" for number in range(100)]


def vitkit_step(images: Tensor, labels: Tensor) -> Call:
    torch.manual_seed(0)
    said = captions(CLASSES)
    backbone = backbones.build("pair_vit", preset="enhanced")
    text = backbones.build("text_transformer", vocabulary=vocabulary_of(said), embed_dim=128, depth=1, num_heads=2)
    projectors = (heads.build("linear", in_dim=tower.embed_dim, out_dim=SHARED) for tower in (backbone, text))
    model = CLIP(backbone, text, *projectors, losses.build("info_nce", temperature=0.07), said)
    batch = {"images": images, "labels": labels}
    return training_step(model, lambda: model(batch)["loss"], adamw(model, lr=1e-4), bf16=True)


def peer_step(images: Tensor, labels: Tensor, *, tuned: bool, compiled: bool) -> Call:
    torch.manual_seed(0)
    tokens, words = get_tokenizer("ViT-B-32")(captions(CLASSES)), 49408
    if tuned:
        tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
        known, tokens = tokens.unique(return_inverse=True)  # in order: the largest id still ends a text
        words = len(known)
    length = tokens.shape[1]
    model = OpenCLIP(
        SHARED,
        CLIPVisionCfg(layers=6, width=512, head_width=64, patch_size=8, image_size=(32, 64)),
        CLIPTextCfg(context_length=length, vocab_size=words, width=128, heads=2, layers=1),
    )
    objective, texts = ClipLoss(), tokens[labels]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tuned)
    return training_step(
        model, lambda: objective(*model(images, texts)), optimizer, bf16=tuned, compiled=tuned and compiled
    )


def embeddings(pairs: int, dim: int) -> tuple[Tensor, Tensor]:
    """Images and captions of which some are found and some are not: six parts in seven of an image are noise."""
    generator = torch.Generator().manual_seed(0)
    texts, noise = (F.normalize(torch.randn(pairs, dim, generator=generator), dim=1) for _ in range(2))
    return F.normalize(texts + 6.0 * noise, dim=1), texts


def ours(images: Tensor, texts: Tensor) -> dict[str, float]:
    numbers, found = torch.arange(len(images)), {}
    for name, queries, items in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        ranking = rank_relevant(queries, items, numbers, numbers)
        found[f"{name}_mean_rank"] = float(ranking.ranks.double().mean())
        found[f"{name}_median_rank"] = median_rank(ranking)
        found |= {f"{name}_R@{k}": hit_rate(ranking, k) for k in (1, 5, 10)}
        found[f"{name}_mAP"] = mean_average_precision(ranking)
    return found


def retrieval(options: Options) -> Row:
    pairs = 1_000 if options.quick else 10_000
    images, texts = embeddings(pairs, 512)
    results: dict[str, dict[str, float]] = {}
    calls = {
        "vitkit": lambda: results.update(vitkit=ours(images, texts)),
        "documented": lambda: results.update(documented=get_clip_metrics(images, texts, 1 / 0.07)),
    }
    seconds = in_turn(calls, min(options.rounds, 3), options.clock)
    for name, value in results["documented"].items():  # near ties may change places
        if abs(results["vitkit"][name] - float(value)) > 1e-6 * float(value) + 2 / pairs:
            raise SystemExit(f"{name}: {results['vitkit'][name]} here, {value} in open_clip")
    rate = f"{pairs / statistics.median(seconds['vitkit']):,.0f} pairs/s"
    what = f"evaluation: ranks of {pairs:,} pairs and captions"
    return Row("CLIP", what, rate, times(seconds, "documented"), wanted="≥ 5", peer="open_clip's get_clip_metrics")


def rows(options: Options) -> list[Row]:
    torch.manual_seed(0)
    images, labels = torch.randn(PAIRS, 3, 32, 64), torch.randint(0, len(CLASSES) ** 2, (PAIRS,))
    steps = {
        "vitkit": vitkit_step(images, labels),
        "documented": peer_step(images, labels, tuned=False, compiled=False),
        "tuned": peer_step(images, labels, tuned=True, compiled=options.compiled),
    }
    what, peer = f"training step, {PAIRS} pairs", "open_clip's CLIP and ClipLoss"
    return [
        compare_steps("CLIP", what, "pairs", PAIRS, steps, options, wanted="tuned ≥ 2", peer=peer),
        retrieval(options),
    ]
