"""Evaluating pairs against captions, beside open_clip's own retrieval metrics over full matrices.

    python tests/benchmarks/retrieval.py [--pairs 10000] [--dim 512] [--rounds 3] [--threads 1]

The peer is open_clip_train.train.get_clip_metrics, which evaluates open_clip's training runs: the matrix of all scores, its
transpose, and a full sort of both. Both get the same normalised embeddings, in turns within one process; memory is the
peak over what was held before, as Linux counts it. Ranks are compared one by one with a sort of each row: places may
differ where scores lie closer than fp32 can tell.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip_train.train import get_clip_metrics
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vitkit_eval import Ranking, rank_relevant
from vitkit_eval.ranking import hit_rate, mean_average_precision, median_rank

SCALE = 1 / 0.07
CLOSE = 1e-6
"""Cosines that lie closer than this may change places."""
NOISE = 6.0
"""So much of an image's embedding is not its caption's; chosen so that some captions are found and some are not."""


def embeddings(pairs: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(pairs, dim, generator=generator), dim=1)
    noise = F.normalize(torch.randn(pairs, dim, generator=generator), dim=1)
    return F.normalize(texts + NOISE * noise, dim=1), texts


def ours(images: Tensor, texts: Tensor) -> dict[str, float]:
    numbers = torch.arange(len(images))
    both = {
        "image_to_text": rank_relevant(images, texts, numbers, numbers),
        "text_to_image": rank_relevant(texts, images, numbers, numbers),
    }
    found: dict[str, float] = {}
    for name, ranking in both.items():
        found |= {
            f"{name}_mean_rank": float(ranking.ranks.double().mean()),
            f"{name}_median_rank": median_rank(ranking),
        }
        found |= {f"{name}_R@{k}": hit_rate(ranking, k) for k in (1, 5, 10)}
        found[f"{name}_mAP"] = mean_average_precision(ranking)
    return found


def peer(images: Tensor, texts: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in get_clip_metrics(images, texts, SCALE).items()}


def misplaced(ranking: Ranking, queries: Tensor, items: Tensor) -> tuple[int, int]:
    """How many ranks differ from those of a sort of each row, and how many of these are more than near ties can explain."""
    differing = wrong = 0
    for rows in torch.arange(len(queries)).split(500):
        scores = queries[rows] @ items.T
        places = (scores.argsort(dim=1, descending=True) == rows[:, None]).nonzero()[:, 1] + 1
        difference = (places - ranking.ranks[rows]).abs()
        near = ((scores - scores[torch.arange(len(rows)), rows, None]).abs() < CLOSE).sum(dim=1) - 1
        differing, wrong = differing + int((difference > 0).sum()), wrong + int((difference > near).sum())
    return differing, wrong


def resident(name: str) -> float:
    """MiB from Linux's own account of this process: "VmRSS" now, "VmHWM" at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, texts = embeddings(arguments.pairs, arguments.dim)
    contenders = {"ours": ours, "peer": peer}  # what the peer has freed would otherwise count for nothing
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, dict[str, float]] = {}
    peaks: dict[str, float] = {}
    few = min(200, arguments.pairs)
    for contender in contenders.values():  # what a first call loads for good
        contender(images[:few], texts[:few])
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            forget_peak()
            before, begin = resident("VmRSS"), time.perf_counter()
            results[name] = contender(images, texts)
            seconds[name].append(time.perf_counter() - begin)
            peaks[name] = max(peaks.get(name, 0.0), resident("VmHWM") - before)
    for name, value in results["peer"].items():
        close = 1e-6 if "R@" not in name and "median" not in name else 0.0
        if abs(results["ours"][name] - value) > close * value + 2 / arguments.pairs:
            raise SystemExit(f"{name}: {results['ours'][name]} here, {value} in open_clip")
    numbers = torch.arange(arguments.pairs)
    told = [misplaced(rank_relevant(a, b, numbers, numbers), a, b) for a, b in ((images, texts), (texts, images))]
    if any(wrong for _, wrong in told):
        raise SystemExit(f"ranks differ from those of a sort: {told}")
    ratio = statistics.median(p / o for p, o in zip(seconds["peer"], seconds["ours"], strict=True))
    table = Table("", "seconds", "peak MiB", "mean rank i→t", "R@1 i→t")
    for name, title in (("peer", "open_clip's get_clip_metrics"), ("ours", "vitkit_eval.rank_relevant")):
        found = results[name]
        table.add_row(
            title,
            f"{statistics.median(seconds[name]):.2f}",
            f"{peaks[name]:,.0f}",
            f"{found['image_to_text_mean_rank']:,.3f}",
            f"{found['image_to_text_R@1']:.2%}",
        )
    out = Console()
    out.print(table)
    out.print(
        f"{ratio:.1f} times as fast, {arguments.pairs:,} pairs, {arguments.dim} dimensions, {arguments.threads} threads; "
        f"of {2 * arguments.pairs:,} ranks {sum(differing for differing, _ in told)} differ, by near ties"
    )


if __name__ == "__main__":
    main()
