"""The arithmetic of the benchmarks of attention and architectures."""

import time

import torch

from benchmarks import architectures, attention_cost
from vitkit import backbones


def test_every_kind_of_attention_is_measured_a_token():
    results = attention_cost.measure([64, 256], width=16, heads=2, rounds=1, total=256, bf16=False, clock=time.process_time)
    for values in (results["microseconds"], results["bytes"]):
        assert set(values) == set(attention_cost.KINDS)
        assert all(len(row) == 2 and min(row) > 0 for row in values.values())


def test_kept_memory_counts_each_storage_once_and_no_parameter():
    attention = attention_cost.build("linear", 4, 8, 1)
    x = torch.randn(1, 16, 8, requires_grad=True)
    kept = attention_cost.kept_bytes(attention, x, bf16=False)
    assert 4 * 16 * 8 * 4 < kept < 64 * 16 * 8 * 4  # between four and 64 tensors of the input's size


def test_a_kind_begins_to_pay_between_two_measured_numbers():
    tokens = [64, 256, 1024]
    assert attention_cost.crossing(tokens, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == "more than 1024"
    assert attention_cost.crossing(tokens, [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]) == "64 or fewer"
    assert attention_cost.crossing(tokens, [1.0, 1.0, 4.0], [2.0, 2.0, 2.0]) == "about 512"


def test_every_architecture_is_built_at_every_size_for_both_datasets():
    for name, sizes in architectures.BACKBONES.items():
        counts = [architectures.model_facts(name, size, (3, 32, 32))["parameters"] for size in ("tiny", "small", "base")]
        assert counts == sorted(counts)
        assert counts[0] < 1e6
        for arguments in sizes.values():
            assert name in backbones
            assert all(isinstance(key, str) for key in arguments)


def test_rows_that_are_finished_are_found_in_the_file(tmp_path):
    out = tmp_path / "table.md"
    assert architectures.finished(out) == set()
    row = {"dataset": "cifar10", "backbone": "swin", "size": "tiny", "test": 0.5, "val": 0.5, "parameters": 9, "mmacs": 1.0, "rate": 2.0}
    out.write_text("| dataset | backbone | size |\n|---|---|---|\n" + architectures.line(row | {"epochs": 3, "seconds": 4.0}) + "\n")
    assert ("cifar10", "swin", "tiny") in architectures.finished(out)
