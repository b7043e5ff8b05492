"""Retrieval by cosine: the places of the relevant items. They are computed in pieces, so that the matrix of all scores is
never in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.distributed import all_reduce_sum, rank, world_size
from vitkit.errors import UsageError
from vitkit_eval.ties import highest, places, share_in_top

CELLS = 2**20
"""Scores held at once, in fp32: 4 MiB, which stay in a processor's cache between the product and the comparison."""


@dataclass(frozen=True)
class Ranking:
    """The places of p relevant pairs of n queries and m items; all int64 on the embeddings' device.

    `query` and `item` `(p,)`: the pairs, sorted by query, then item. `higher` `(p,)`: how many items score higher than the
    pair's for that query; `equal` `(p,)`: how many score the same, itself included. `nearest` `(n,)`: the item with each
    query's highest score, of equal ones the first.
    """

    query: Tensor
    item: Tensor
    higher: Tensor
    equal: Tensor
    nearest: Tensor
    items: int

    @property
    def ranks(self) -> Tensor:
        """The expected place of each pair's item, from 1, float64 `(p,)` on the CPU: a whole number where no scores are equal."""
        return self.higher.cpu().double() + (self.equal.cpu().double() + 1) / 2  # not every accelerator computes in fp64


def rank_relevant(queries: Tensor, items: Tensor, query: Tensor, item: Tensor, *, cells: int = CELLS) -> Ranking:
    """The places of the relevant items when queries `(n d)` rank all items `(m d)` by cosine.

    The p relevant pairs are (`query`, `item`), two int64 `(p,)`, each pair once. Equal scores are in random order, see
    `vitkit_eval.ties`. A relevant item whose score is NaN is the last; another item whose score is NaN counts as higher.

    About `cells` scores are in memory at a time, and at least the scores of one query. Scores are computed in fp32, also
    under autocast.

    Ranks: every rank must give the same embeddings. It ranks its share of the queries in the same pieces as one process
    would, and all ranks return the same result.

    Raises `UsageError` if the embeddings are not two matrices of one width, if one is empty, or if a pair is out of range
    or given twice.
    """
    _check(queries, items, query, item)
    n, m = len(queries), len(items)
    order = (query * m + item).argsort()
    query, item = query[order], item[order]
    if bool(((query.diff() == 0) & (item.diff() == 0)).any()):
        raise UsageError("a relevant pair is given twice; give each (query, item) once")
    higher, equal = torch.zeros_like(query), torch.zeros_like(query)
    nearest = torch.zeros(n, dtype=torch.int64, device=queries.device)
    rows = max(1, cells // m)
    for first, scores in _pieces(queries, items, rows):
        last = first + len(scores)
        nearest[first:last] = scores.argmax(dim=1)
        begin, end = torch.searchsorted(query, torch.tensor([first, last], device=query.device)).tolist()
        for start in range(begin, end, rows):
            part = slice(start, min(start + rows, end))
            row = query[part] - first
            compared = scores if _each_row_once(row, len(scores)) else scores[row]
            higher[part], equal[part] = places(compared, scores[row, item[part]])
    return Ranking(query, item, all_reduce_sum(higher), all_reduce_sum(equal), all_reduce_sum(nearest), m)


def nearest_items(query: Tensor, items: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` items `(m d)`, or all, nearest to each query `(n d)`: cosines fp32 and numbers `(n count)`, best first.

    Of equal scores the item of lower number is first.
    """
    _check(query, items, torch.zeros(0), torch.zeros(0))
    pieces = _pieces(query, items, max(1, CELLS // len(items)), shared=False)
    best, numbers = zip(*(highest(scores, min(count, len(items))) for _, scores in pieces), strict=True)
    return torch.cat(best), torch.cat(numbers)


def _check(queries: Tensor, items: Tensor, query: Tensor, item: Tensor) -> None:
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1] or not len(queries) or not len(items):
        raise UsageError(
            f"queries are {tuple(queries.shape)} and items {tuple(items.shape)}; expected (n, d) and (m, d) of one width d, "
            f"at least one each"
        )
    if query.shape != item.shape or query.ndim != 1:
        raise UsageError(
            f"relevant pairs are {tuple(query.shape)} and {tuple(item.shape)}; expected two vectors of one length"
        )
    for name, numbers, most in (("query", query, len(queries)), ("item", item, len(items))):
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < most:
            raise UsageError(
                f"relevant pairs name {name} {int(numbers.min())} to {int(numbers.max())}; there are {most}, counted from 0"
            )


def _pieces(queries: Tensor, items: Tensor, rows: int, *, shared: bool = True) -> Iterator[tuple[int, Tensor]]:
    """The first query's number and the cosines `(rows m)` of this rank's pieces, every W-th of them, or of all pieces."""
    step = rows * world_size() if shared else rows
    with torch.autocast(queries.device.type, enabled=False):
        turned = F.normalize(items.float(), dim=1).T
        for first in range(rows * rank() if shared else 0, len(queries), step):
            yield first, F.normalize(queries[first : first + rows].float(), dim=1) @ turned


def _each_row_once(row: Tensor, count: int) -> bool:
    """Whether each of `count` rows is named once, in order: then the scores need not be copied."""
    return len(row) == count and bool((row.diff() == 1).all())


def hit_rate(ranking: Ranking, k: int) -> float:
    """The share of queries with a relevant item among their first `k`; queries without a relevant item do not count.

    The first relevant item of a query is in a group of n equal scores, r of them relevant, behind N higher ones. With
    s = k − N places left for the group, none of the r is among them with probability C(n − r, s) / C(n, s).
    """
    first = _groups(ranking).first()
    left = (k - first.higher).clamp(min=0).minimum(first.equal)
    others = first.equal - first.relevant
    none = (_log_choose(others, left.minimum(others)) - _log_choose(first.equal, left)).exp()
    return float(1 - none.masked_fill(left > others, 0.0).mean())


def recall(ranking: Ranking, k: int) -> float:
    """The share of a query's relevant items among its first `k`, in the mean over queries that have a relevant item."""
    shares = share_in_top(ranking.higher, ranking.equal, k)
    query, counts = ranking.query.cpu().unique_consecutive(return_inverse=True, return_counts=True)[1:]
    return float((torch.zeros(len(counts), dtype=torch.float64).index_add_(0, query, shares) / counts).mean())


def mean_average_precision(ranking: Ranking) -> float:
    """The mean over queries of (1/R) Σ_j j / r_j: r_1 < … < r_R are the places of a query's R relevant items.

    In a group of n equal scores behind N higher ones, r of them relevant and R₀ relevant ones before the group, each place
    N + i, i = 1 … n, is relevant with probability r/n, and then R₀ + 1 + (i − 1)·c relevant ones are expected up to there,
    c = (r − 1)/(n − 1) (McSherry and Najork, ECIR 2008). The sum over i is (r/n)·(c·n + (R₀ + 1 − (N + 1)·c)·(H_{N+n} − H_N)).
    """
    groups = _groups(ranking)
    r, n, before = groups.relevant.double(), groups.equal.double(), groups.before.double()
    c = (r - 1) / (n - 1).clamp(min=1)
    harmonic = torch.cat([torch.zeros(1), (1.0 / torch.arange(1, ranking.items + 1, dtype=torch.float64)).cumsum(0)])
    reciprocals = harmonic[groups.higher + groups.equal] - harmonic[groups.higher]
    sums = r / n * (c * n + (before + 1 - (groups.higher + 1) * c) * reciprocals)
    queries = int(groups.query[-1]) + 1
    total = torch.zeros(queries, dtype=torch.float64).index_add_(0, groups.query, sums)
    return float((total / torch.zeros(queries, dtype=torch.float64).index_add_(0, groups.query, r)).mean())


def median_rank(ranking: Ranking) -> float:
    """The median over queries of their first relevant item's expected place; of an even number the lower of the middle two.

    In a group of n equal scores behind N higher ones, r of them relevant, it is N + (n + 1)/(r + 1).
    """
    first = _groups(ranking).first()
    return float((first.higher + (first.equal + 1) / (first.relevant + 1)).median())


@dataclass(frozen=True)
class _Groups:
    """The groups of equal scores that hold relevant items, by query and place, on the CPU.

    `query`: the query's number, without gaps; `higher` and `equal`: as in `Ranking`; `relevant`: relevant items of the group;
    `before`: relevant items of that query with a higher score.
    """

    query: Tensor
    higher: Tensor
    equal: Tensor
    relevant: Tensor
    before: Tensor

    def first(self) -> "_Groups":
        """The first group of each query."""
        chosen = self.before == 0
        return _Groups(*(part[chosen] for part in (self.query, self.higher, self.equal, self.relevant, self.before)))


def _groups(ranking: Ranking) -> _Groups:
    query = ranking.query.cpu().unique_consecutive(return_inverse=True)[1]
    keys = query * (ranking.items + 1) + ranking.higher.cpu()
    keys, order = keys.sort()
    keys, relevant = keys.unique_consecutive(return_counts=True)
    equal = ranking.equal.cpu()[order][relevant.cumsum(0) - relevant]
    query, higher = keys // (ranking.items + 1), keys % (ranking.items + 1)
    total = relevant.cumsum(0) - relevant
    starts = torch.searchsorted(query, query)  # the first group of each query
    return _Groups(query, higher, equal, relevant, total - total[starts])


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    n, k = n.double(), k.double()
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
