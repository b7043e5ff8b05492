"""The comparison of methods without labels: its table, its flags, and the rows that need no training."""

import pytest

import vitkit
from benchmarks.ssl import cell, costs, recipe_flags, table, untrained
from vitkit.errors import UsageError


def test_a_cell_is_a_value_or_a_mean_with_the_smallest_and_the_largest():
    assert (cell([]), cell([0.5]), cell([0.5, 0.7])) == ("", "0.5000", "0.6000 (0.5000–0.7000)")


def test_the_table_has_a_row_for_each_method_and_a_column_for_each_share():
    rows = {"mae": [{"knn_top1": 0.4, "linear_top1": 0.5, "val_rankme": 20.0, "1%": 0.3, "epochs": 3.0, "processor_seconds": 70.2}],
            "raw pixels": [{"knn_top1": 0.3}]}  # fmt: skip
    assert table(rows, [0.01]).splitlines() == [
        "| method | kNN | linear | RankMe | fine-tuned, 1% of the labels | epochs | processor time |",
        "|---|---|---|---|---|---|---|",
        "| mae | 0.4000 | 0.5000 | 20.0 | 0.3000 | 3 | 70 s |",
        "| raw pixels | 0.3000 |  |  |  |  |  |",
    ]


def test_words_become_flags_of_the_recipe():
    assert recipe_flags(["--embed-dim", "96", "--stem", "conv"]) == {"embed_dim": 96, "stem": "conv"}
    assert recipe_flags([]) == {}
    with pytest.raises(ValueError, match="zip"):
        recipe_flags(["--depth"])
    with pytest.raises(UsageError, match="NAME=VALUE"):
        recipe_flags(["96", "--depth"])


def test_the_untrained_network_and_pixels_are_measured_and_the_network_is_saved(tmp_path):
    flags = {"dataset": "digits", "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "eval_size": 50}
    scores = untrained(flags, 0, tmp_path)
    assert {"knn_top1", "linear_top1", "val_rankme", "pixels_knn_top1", "pixels_linear_top1"} <= set(scores)
    assert vitkit.load(tmp_path / "model").backbone.embed_dim == 32


def test_masking_three_quarters_saves_more_than_half_of_the_encoder():
    header, _, whole, quarter = costs([0.0, 0.75], rounds=1).splitlines()
    assert header == "| masked | encoder | encoder, decoder and loss |"
    assert whole.startswith("| 0% | 1.00 (")
    assert float(quarter.split("|")[2].split()[0]) < 0.5
