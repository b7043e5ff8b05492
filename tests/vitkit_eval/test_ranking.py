"""Ranks in pieces: exact cases, ties, torchmetrics and memory."""

from functools import partial
from itertools import permutations

import pytest
import torch
from pretending import Pretending, elsewhere
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalRecall

from vitkit.errors import UsageError
from vitkit_eval import Ranking, nearest_items, rank_relevant
from vitkit_eval.ranking import hit_rate, mean_average_precision, median_rank, recall
from vitkit_eval.retrieval import chance_hit_rate, chance_map, chance_median_rank, chance_recall, retrieval_scores


def made(n: int = 40, m: int = 30, d: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, items, and relevant pairs: query 0 has none, query 1 has ten, each other one to three."""
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.randn(size, d, generator=generator) for size in (n, m))
    relevant = torch.rand(n, m, generator=generator) < 0.05
    relevant[:, 7] |= ~relevant.any(1)
    relevant[0], relevant[1, :10] = False, True
    query, item = relevant.nonzero().unbind(1)
    shuffled = torch.randperm(len(query), generator=generator)
    return queries, items, query[shuffled], item[shuffled]


def scores_of(queries: Tensor, items: Tensor) -> Tensor:
    return torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(items, dim=1).T


@pytest.mark.parametrize("cells", [1, 100, 10**6])
def test_ranks_are_places_in_the_sorted_row(cells):
    queries, items, query, item = made()
    found = rank_relevant(queries, items, query, item, cells=cells)
    scores = scores_of(queries, items)
    places = scores.argsort(dim=1, descending=True).argsort(dim=1) + 1
    assert torch.equal(found.ranks, places[found.query, found.item].double())
    assert torch.equal(found.nearest, scores.argmax(1))
    assert sorted(zip(query.tolist(), item.tolist(), strict=True)) == list(
        zip(found.query.tolist(), found.item.tolist(), strict=True)
    )


def test_metrics_are_those_of_torchmetrics():
    queries, items, query, item = made()
    found = rank_relevant(queries, items, query, item)
    scores = scores_of(queries, items)
    target = torch.zeros_like(scores, dtype=torch.bool)
    target[query, item] = True
    numbers = torch.arange(len(queries))[:, None].expand_as(scores)
    given = [
        part.flatten() for part in (scores + 2, target, numbers)
    ]  # torchmetrics takes what is not positive for a miss

    def reference(metric):
        return pytest.approx(float(metric(given[0], given[1], indexes=given[2])), abs=1e-6)

    skip = {"empty_target_action": "skip"}
    for k in (1, 3, 10):
        assert hit_rate(found, k) == reference(RetrievalHitRate(top_k=k, **skip))
        assert recall(found, k) == reference(RetrievalRecall(top_k=k, **skip))
    assert mean_average_precision(found) == reference(RetrievalMAP(**skip))
    first = {q: min(found.ranks[found.query == q].tolist()) for q in query.tolist()}
    assert median_rank(found) == sorted(first.values())[(len(first) - 1) // 2]


def test_a_model_that_ties_everything_scores_chance_exactly_whatever_the_order_of_items():
    query, item = made()[2:]
    found = rank_relevant(torch.ones(40, 2), torch.ones(30, 2), query, item)
    counts = found.query.unique_consecutive(return_counts=True)[1]
    for k in (1, 5, 20):
        assert hit_rate(found, k) == pytest.approx(chance_hit_rate(counts, 30, k))
        assert recall(found, k) == pytest.approx(chance_recall(30, k))
    assert mean_average_precision(found) == pytest.approx(chance_map(counts, 30))
    assert set(found.nearest.tolist()) == {0}


@pytest.mark.parametrize("cells", [1, 10**6])
def test_metrics_of_equal_scores_are_the_means_over_all_their_orders(cells):
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    items = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 1.0]])
    query, item = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 0, 3, 4, 2])
    found = rank_relevant(queries, items, query, item, cells=cells)
    assert found.ranks.tolist() == [3.5, 1, 3.5, 2.5, 5.5]
    exact = []
    for order in permutations(range(6)):
        order = torch.tensor(order)
        # Distinct scores, equal ones in this order.
        scores = scores_of(queries, items) - 1e-3 * order.argsort()
        places = scores.argsort(dim=1, descending=True).argsort(dim=1)[found.query, found.item]
        exact.append(Ranking(found.query, found.item, places, torch.ones_like(places), found.nearest, 6))
    for metric in (*(partial(m, k=k) for m in (hit_rate, recall) for k in range(1, 7)), mean_average_precision):
        assert metric(found) == pytest.approx(sum(map(metric, exact)) / len(exact))
    assert median_rank(found) == 1.0


def test_what_is_no_number_is_found_last():
    queries = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    found = rank_relevant(queries, torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert found.ranks.tolist() == [1, 2]


def test_the_order_of_items_is_of_no_importance():
    queries, items, query, item = made()
    turn = torch.randperm(len(items), generator=torch.Generator().manual_seed(1))
    inverse = turn.argsort()
    found, turned = (
        rank_relevant(queries, items, query, item),
        rank_relevant(queries, items[turn], query, inverse[item]),
    )
    for metric in (mean_average_precision, median_rank, lambda ranking: recall(ranking, 3)):
        assert metric(found) == pytest.approx(metric(turned))


def test_chance_is_what_random_orders_score():
    generator = torch.Generator().manual_seed(0)
    n, m = 4000, 20
    counts = torch.arange(n) % 3 * 3 + 1  # 1, 4 and 7 relevant items
    target = torch.zeros(n, m, dtype=torch.bool)
    for number, count in enumerate(counts.tolist()):
        target[number, :count] = True
    query, item = target.nonzero().unbind(1)
    order = torch.rand(n, m, generator=generator).argsort(dim=1) + 1
    found = rank_relevant(torch.randn(n, 2), torch.randn(m, 2), query, item)
    places = order[found.query, found.item] - 1
    random = Ranking(found.query, found.item, places, torch.ones_like(places), found.nearest, m)
    for k in (1, 5, 20):
        assert hit_rate(random, k) == pytest.approx(chance_hit_rate(counts, m, k), abs=0.03)
        assert recall(random, k) == pytest.approx(chance_recall(m, k), abs=0.02)
    assert mean_average_precision(random) == pytest.approx(chance_map(counts, m), abs=0.02)
    assert median_rank(random) == chance_median_rank(counts, m)


def test_chance_of_one_relevant_item_in_closed_form():
    one = torch.ones(7, dtype=torch.int64)
    assert chance_hit_rate(one, 10_000, 100) == pytest.approx(0.01)
    assert chance_hit_rate(one, 5, 100) == chance_recall(5, 100) == 1.0
    assert chance_median_rank(one, 10_000) == 5_000
    assert chance_map(one, 4) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert chance_map(torch.tensor([1]), 1) == 1.0


def test_scores_name_their_protocol():
    queries, items, query, item = made()
    scores = retrieval_scores("x", rank_relevant(queries, items, query, item), (1, 5), note="made", recalls=True)
    assert list(scores) == ["x_top1", "x_top5", "x_recall1", "x_recall5", "x_map", "x_median_rank"]
    protocol = scores.protocols["x_recall5"]
    assert (protocol.split, protocol.samples, protocol.chance, protocol.note) == ("test", 39, 5 / 30, "made")
    kinds = {name.removeprefix("x_"): (protocol.kind, protocol.direction) for name, protocol in scores.protocols.items()}
    assert kinds.pop("median_rank") == ("error", "min")
    assert kinds.pop("map") == ("score", "max")
    assert set(kinds.values()) == {("proportion", "max")}


def test_nearest_items_are_sorted_and_stable():
    items = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    scores, numbers = nearest_items(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), items, 3)
    assert numbers.tolist() == [[1, 2, 3], [0, 3, 1]]
    torch.testing.assert_close(scores[0], torch.tensor([1.0, 1.0, 0.5**0.5]))
    assert nearest_items(torch.ones(1, 2), items, 99)[1].shape == (1, 4)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(part.numel() for part in given if isinstance(part, Tensor))])
        return result


@pytest.mark.parametrize("relevant", [1, 100])
def test_the_matrix_of_all_scores_never_stands_in_memory(relevant):
    n, cells = 600, 30_000
    queries, items = torch.randn(2, n, 8)
    with Largest() as largest:
        rank_relevant(queries, items, torch.arange(n) // relevant, torch.arange(n), cells=cells)
    assert n * 8 < largest.numel <= cells < n * n


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(2, 4)),
            r"queries are \(2, 3\) and items \(2, 4\); expected \(n, d\) and \(m, d\)",
        ),
        ((torch.ones(0, 3), torch.ones(2, 3)), "at least one each"),
        (
            (torch.ones(2, 3), torch.ones(2, 3), [0], [0, 1]),
            r"relevant pairs are \(1,\) and \(2,\); expected two vectors",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, 3), [0], [2]),
            "relevant pairs name item 2 to 2; there are 2, counted from 0",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3), [1, 1], [0, 0]), "a relevant pair is given twice"),
    ],
)
def test_wrong_arguments_say_what_was_expected(arguments, message):
    queries, items, *pairs = arguments
    query, item = (torch.tensor(numbers) for numbers in (pairs or ([0], [0])))
    with pytest.raises(UsageError, match=message):
        rank_relevant(queries, items, query, item)


def test_a_ranking_is_scored_on_a_device_without_fp64():
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(20, 6, generator=generator), torch.randn(30, 6, generator=generator)
    query, item = torch.arange(20).repeat(2), torch.randperm(30, generator=generator).repeat(2)[:40]
    expected = retrieval_scores("x", rank_relevant(queries, items, query, item), (1, 5), note="", recalls=True)
    with Pretending():
        found = rank_relevant(*map(elsewhere, (queries, items, query, item)))
        with pytest.raises(TypeError, match="doesn't support float64"):
            found.higher.double()
        assert retrieval_scores("x", found, (1, 5), note="", recalls=True) == expected
