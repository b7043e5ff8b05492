"""What a ranking scores, beside what ranking at random would."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkit.contracts import Measurement, Scores
from vitkit_eval.ranking import Ranking, hit_rate, mean_average_precision, median_rank, recall


def retrieval_scores(
    name: str,
    found: Ranking,
    tops: Sequence[int],
    *,
    note: str,
    frozen: str = "",
    split: str = "test",
    recalls: bool = False,
) -> Scores:
    """`<name>_top{k}` (see `hit_rate`), `<name>_map` and `<name>_median_rank`, and with `recalls` `<name>_recall{k}`.

    Each has the chance level of a random order of the same items. Where every query has one relevant item, recall is the
    hit rate, and need not be asked for.
    """
    relevant = found.query.unique_consecutive(return_counts=True)[1]
    queries, items = len(relevant), found.items
    values = {f"{name}_top{k}": (hit_rate(found, k), chance_hit_rate(relevant, items, k)) for k in tops}
    if recalls:
        values |= {f"{name}_recall{k}": (recall(found, k), chance_recall(items, k)) for k in tops}
    values[f"{name}_map"] = (mean_average_precision(found), chance_map(relevant, items))
    values[f"{name}_median_rank"] = (median_rank(found), chance_median_rank(relevant, items))
    return Scores(
        {column: value for column, (value, _) in values.items()},
        protocols={
            column: Measurement(split, queries, chance=chance, frozen=frozen, note=note)
            for column, (_, chance) in values.items()
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
