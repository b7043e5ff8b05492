"""The metrics of a ranking, each with its chance level: the value for a random order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkit.contracts import Measurement, MetricKind, Scores, SplitName
from vitkit_eval.ranking import Ranking, hit_rate, mean_average_precision, median_rank, recall


def retrieval_scores(
    name: str,
    ranking: Ranking,
    tops: Sequence[int],
    *,
    note: str,
    frozen: str = "",
    split: SplitName = "test",
    recalls: bool = False,
) -> Scores:
    """`<name>_top{k}` (see `hit_rate`), `<name>_map` and `<name>_median_rank`, and with `recalls` `<name>_recall{k}`.

    If every query has one relevant item, recall equals the hit rate. Names are those of the test split.
    """
    relevant = ranking.query.unique_consecutive(return_counts=True)[1]
    queries, items = len(relevant), ranking.items
    measured: list[tuple[str, float, float, MetricKind]] = []
    for k in tops:
        measured.append((f"top{k}", hit_rate(ranking, k), chance_hit_rate(relevant, items, k), "proportion"))
    for k in tops if recalls else ():
        measured.append((f"recall{k}", recall(ranking, k), chance_recall(items, k), "proportion"))
    measured.append(("map", mean_average_precision(ranking), chance_map(relevant, items), "score"))
    measured.append(("median_rank", median_rank(ranking), chance_median_rank(relevant, items), "error"))
    return Scores(
        {f"{name}_{metric}": value for metric, value, _, _ in measured},
        protocols={
            f"{name}_{metric}": Measurement(split, queries, chance=chance, frozen=frozen, note=note, kind=kind)
            for metric, _, chance, kind in measured
        },
    )


def chance_hit_rate(relevant: Tensor, items: int, k: int) -> float:
    """The expected share of queries with a hit among their first k of m `items`; R of them are relevant, `relevant` `(n,)`.

    1 − C(m − R, k) / C(m, k) = 1 − Π_{i<k} (m − R − i) / (m − i), in the mean over queries.
    """
    return 1.0 - float(_none_among(relevant, items)[min(k, items)])


def chance_recall(items: int, k: int) -> float:
    """The expected share of relevant items among the first k of m: k / m."""
    return min(k / items, 1.0)


def chance_map(relevant: Tensor, items: int) -> float:
    """The expected mean average precision: (1/m)·(H_m + (R − 1)/(m − 1)·(m − H_m)), in the mean over queries."""
    harmonic = float((1.0 / torch.arange(1, items + 1, dtype=torch.float64)).sum())
    others = (relevant.cpu().double() - 1) / max(items - 1, 1)
    return float(((harmonic + others * (items - harmonic)) / items).mean())


def chance_median_rank(relevant: Tensor, items: int) -> float:
    """The median over queries of the first relevant item's place: the first that half of them have reached."""
    return float((_none_among(relevant, items) <= 0.5 + 1e-9).nonzero()[0, 0])


def _none_among(relevant: Tensor, items: int) -> Tensor:
    """The probability `(m + 1,)`, in the mean over queries, that no relevant item is among the first 0, 1, …, m."""
    kinds, counts = relevant.cpu().unique(return_counts=True)
    left = torch.arange(items, 0, -1, dtype=torch.float64)  # m, m − 1, …, 1
    steps = ((left - kinds[:, None]) / left).clamp(min=0).cumprod(dim=1)  # (kinds m)
    mean = (steps * counts[:, None]).sum(dim=0) / counts.sum()
    return torch.cat([torch.ones(1, dtype=torch.float64), mean])
