"""What counts as best, and rows as CSV."""

import csv

from vitkit.runs.summary import best_of, lower_is_better, write_csv


def test_errors_costs_and_ranks_are_better_when_lower():
    lower = ("val_loss", "pixel_mse", "i2t_median_rank", "swapped_top1", "swapped_above", "seconds")
    higher = ("m1_top1", "lossless", "i2t_map", "psnr")
    assert all(map(lower_is_better, lower))
    assert not any(map(lower_is_better, higher))


def test_the_best_is_the_first_of_the_best_values_and_missing_ones_do_not_count():
    rows = [
        {"epoch": 1, "step": 10, "knn_top1": 0.5, "median_rank": 9.0},
        {"epoch": 2, "step": 20, "knn_top1": 0.7, "median_rank": None},
        {"epoch": 3, "step": 30, "knn_top1": 0.7, "median_rank": 4.0},
    ]
    assert best_of(rows) == {
        "knn_top1": {"value": 0.7, "epoch": 2},
        "median_rank": {"value": 4.0, "epoch": 3},
    }


def test_what_is_not_finite_is_never_best():
    nan, inf = float("nan"), float("inf")
    rows = [{"epoch": n, "top1": a, "loss": b, "lost": nan} for n, a, b in ((1, nan, inf), (2, 0.2, nan), (3, inf, 0.5), (4, 0.1, -inf))]
    assert best_of(rows) == {"top1": {"value": 0.2, "epoch": 2}, "loss": {"value": 0.5, "epoch": 3}}


def test_rows_are_written_under_all_their_columns(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "knn": 0.25}])
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"epoch": "1", "loss": "0.5", "knn": ""},
            {"epoch": "2", "loss": "", "knn": "0.25"},
        ]
