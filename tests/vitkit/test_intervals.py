"""Wilson's interval against published values and statistics of simulated draws."""

import pytest
import torch

from vitkit.errors import UsageError
from vitkit.intervals import Z95, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_it_has_the_values_of_published_tables(hits, total, low, high):
    """The last two are Newcombe's, Statistics in Medicine 17, 1998."""
    assert wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_its_ends_solve_the_score_equation():
    for hits, total in ((3, 17), (150, 200), (1, 1000)):
        for end in wilson(hits, total):
            assert abs(hits / total - end) == pytest.approx(Z95 * (end * (1 - end) / total) ** 0.5)


def test_it_covers_the_truth_in_about_95_percent_of_draws():
    generator = torch.Generator().manual_seed(0)
    for truth in (0.1, 0.5, 0.95):
        counts = torch.binomial(torch.full((2000,), 60.0), torch.tensor(truth).expand(2000), generator=generator).long().tolist()
        covered = sum(low <= truth <= high for low, high in (wilson(count, 60) for count in counts))
        assert 0.93 <= covered / 2000 <= 0.98


def test_without_samples_nothing_is_known():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(UsageError, match="hits is 3 of 2; expected 0 to 2"):
        wilson(3, 2)
