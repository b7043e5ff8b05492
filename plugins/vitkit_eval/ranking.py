"""Retrieval by cosine: ranks in pieces, so that the matrix of all scores never stands in memory, and what follows from them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.distributed import all_reduce_sum, rank, world_size
from vitkit.errors import UsageError

CELLS = 2**20
"""Scores held at once, in fp32: 4 MiB, which stay in a processor's cache between the product and the comparison."""


@dataclass(frozen=True)
class Ranking:
    """What p relevant pairs of n queries and m items came to; all int64 on the embeddings' device.

    `query` and `item` `(p,)`: the pairs, sorted by query, then item. `ranks` `(p,)`: the place of each pair's item among
    the m for that query, from 1. `nearest` `(n,)`: the item with each query's highest score, of equals the first.
    """

    query: Tensor
    item: Tensor
    ranks: Tensor
    nearest: Tensor
    items: int


def rank_relevant(queries: Tensor, items: Tensor, query: Tensor, item: Tensor, *, cells: int = CELLS) -> Ranking:
    """Where the relevant items stand when queries `(n d)` rank all items `(m d)` by cosine.

    The p relevant pairs are (`query`, `item`), two int64 `(p,)`, each pair once. Ties: an item that is not relevant stands
    before a relevant one of equal score, and of relevant ones the first in number before the next. So a model to which
    everything is one finds nothing, whatever the order of its items. A score that is no number counts as above all others.

    No more than about `cells` scores, but at least one query's, are held at once. Scores are computed in fp32, under
    autocast too.

    Ranks: every rank gives the same embeddings, ranks its share of the queries in the same pieces as one process would, and
    returns the same.

    Raises `UsageError` for embeddings that are not two matrices of one width, empty ones, and pairs outside of them or given
    twice.
    """
    _check(queries, items, query, item)
    n, m = len(queries), len(items)
    order = (query * m + item).argsort()
    query, item = query[order], item[order]
    if bool(((query.diff() == 0) & (item.diff() == 0)).any()):
        raise UsageError("the relevant pairs hold one twice; give each (query, item) once")
    place, own = torch.zeros_like(query), torch.zeros(len(query), device=queries.device)
    nearest = torch.zeros(n, dtype=torch.int64, device=queries.device)
    rows = max(1, cells // m)
    for first, scores in _pieces(queries, items, rows):
        last = first + len(scores)
        nearest[first:last] = scores.argmax(dim=1)
        begin, end = torch.searchsorted(query, torch.tensor([first, last], device=query.device)).tolist()
        for start in range(begin, end, rows):
            part = slice(start, min(start + rows, end))
            row = query[part] - first
            own[part] = scores[row, item[part]]
            # `~(<)` rather than `>=`, so that what is no number counts as ahead.
            compared = scores if _whole(row, len(scores)) else scores[row]
            place[part] = (~(compared < own[part, None])).sum(dim=1)
    place, own, nearest = all_reduce_sum(place), all_reduce_sum(own), all_reduce_sum(nearest)
    return Ranking(query, item, place - _equals_after(query, own), nearest, m)


def nearest_items(query: Tensor, items: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` items `(m d)`, or all, nearest to each query `(n d)`: cosines fp32 and numbers `(n count)`, best first.

    Of equal scores the first in number stands first.
    """
    _check(query, items, torch.zeros(0), torch.zeros(0))
    found = []
    for _, scores in _pieces(query, items, max(1, CELLS // len(items)), shared=False):
        best, numbers = scores.sort(dim=1, descending=True, stable=True)
        found.append((best[:, :count], numbers[:, :count]))
    best, numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
    return best, numbers


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


def _whole(row: Tensor, count: int) -> bool:
    """Whether each of `count` rows is named once, in order: then the scores need not be copied."""
    return len(row) == count and bool((row.diff() == 1).all())


def _equals_after(query: Tensor, own: Tensor) -> Tensor:
    """For each relevant pair, sorted by query and item, how many of the same query and score come after it."""
    order = own.argsort(stable=True)
    order = order[query[order].argsort(stable=True)]  # by query, then score, then item
    query, own = query[order], own[order]
    new = torch.ones_like(query, dtype=torch.bool)
    new[1:] = (query[1:] != query[:-1]) | (own[1:] != own[:-1])
    group = new.cumsum(0) - 1
    counts = torch.bincount(group)
    ends = counts.cumsum(0)
    after = torch.empty_like(query)
    after[order] = ends[group] - 1 - torch.arange(len(query), device=query.device)
    return after


def hit_rate(found: Ranking, k: int) -> float:
    """The share of queries with a relevant item among their first `k`; queries without one count nowhere."""
    return float((_first(found) <= k).cpu().double().mean())  # not every accelerator computes in fp64


def recall(found: Ranking, k: int) -> float:
    """The share of a query's relevant items among its first `k`, in the mean over queries that have one."""
    counts = _counts(found)
    hits = torch.zeros_like(counts).index_add_(0, _numbered(found), (found.ranks <= k).long())
    return float((hits.cpu().double() / counts.cpu()).mean())


def mean_average_precision(found: Ranking) -> float:
    """The mean over queries of (1/R) Σ_j j / r_j: r_1 < … < r_R are the places of a query's R relevant items."""
    query, ranks, counts = found.query.cpu(), found.ranks.cpu(), _counts(found).cpu()  # not every accelerator computes in fp64
    order = ranks.argsort()
    order = order[query[order].argsort(stable=True)]
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    j = torch.arange(len(order)) - starts + 1
    precision = j.double() / ranks[order]
    sums = torch.zeros(len(counts), dtype=torch.float64)
    return float((sums.index_add_(0, _numbered(found).cpu(), precision) / counts).mean())


def median_rank(found: Ranking) -> float:
    """The median over queries of their first relevant item's place; of an even number the lower of the middle two."""
    return float(_first(found).median())


def _numbered(found: Ranking) -> Tensor:
    """The pairs' queries, counted without gaps, `(p,)`."""
    return found.query.unique_consecutive(return_inverse=True)[1]


def _counts(found: Ranking) -> Tensor:
    """How many relevant items each query has that has one."""
    return found.query.unique_consecutive(return_counts=True)[1]


def _first(found: Ranking) -> Tensor:
    """The best place of each query that has a relevant item."""
    counts = _counts(found)
    best = torch.full_like(counts, found.items)
    return best.scatter_reduce(0, _numbered(found), found.ranks, "amin")
