"""The units of the processor: one decision, which the environment can overrule."""

import subprocess
import sys

import pytest
import torch

from vitkit.training import processor
from vitkit.training.accelerator import resolve_precision


@pytest.fixture
def every_unit(monkeypatch):
    for name in processor.ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_avx512_supported", "_is_avx2_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: True, raising=False)


@pytest.mark.parametrize("variable", processor.ISA_VARIABLES)
@pytest.mark.parametrize(
    ("limit", "unit"),
    [
        (None, "AMX"), ("DEFAULT", "AMX"), ("avx512_core_amx", "AMX"), ("avx512_core_bf16", "AVX512-BF16"),
        ("avx512_core", "AVX-512"), ("AVX2", "AVX2"), ("avx2_vnni", "AVX2"), ("sse41", "none"),
    ],
)  # fmt: skip
def test_the_environment_takes_units_away(every_unit, monkeypatch, variable, limit, unit):
    if limit is not None:
        monkeypatch.setenv(variable, limit)
    assert processor.cpu_unit() == unit
    assert processor.has_fast_bf16("cpu") == (unit in ("AMX", "AVX512-BF16"))
    assert resolve_precision("auto", "cpu") == ("bf16" if processor.has_fast_bf16("cpu") else "fp32")


def test_the_smaller_of_two_limits_counts(every_unit, monkeypatch):
    monkeypatch.setenv("VITKIT_CPU_ISA", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert processor.cpu_unit() == "AVX2"


def test_a_run_without_a_bf16_unit_is_told_what_to_expect(every_unit, monkeypatch):
    assert processor.precision_note("bf16", "cpu") == processor.precision_note("fp32", "cuda") == ""
    monkeypatch.setenv("VITKIT_CPU_ISA", "avx2")
    monkeypatch.setattr(processor, "bf16_seconds_per_fp32_second", lambda: 12.34)
    assert processor.precision_note("fp32", "cpu") == (
        "a processor with AVX2 and no bf16 unit: the run computes in fp32, and takes about twice as long as on one with "
        "AVX512-BF16 or AMX"
    )
    assert processor.precision_note("bf16", "cpu") == (
        "a processor with AVX2 and no bf16 unit emulates bf16: a matrix product takes 12.3 times as long as in fp32; "
        "--precision fp32 is faster"
    )


def test_a_precision_that_the_processor_cannot_compute_in_is_refused_at_its_first_use(every_unit, monkeypatch):
    monkeypatch.setenv("VITKIT_CPU_ISA", "avx2")
    assert resolve_precision("bf16", "cpu") == "bf16"  # tried, and emulated
    monkeypatch.setattr("vitkit.training.accelerator.bf16_seconds_per_fp32_second", lambda: float("inf"))
    with pytest.raises(Exception, match="--precision bf16: this processor cannot compute in bf16; use fp32"):
        resolve_precision("bf16", "cpu")


def test_the_cost_of_bf16_is_measured_once():
    cost = processor.bf16_seconds_per_fp32_second()
    assert cost > 0
    assert processor.bf16_seconds_per_fp32_second() == cost


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept_so_that_a_step_maps_no_page_anew():
    code = """
import resource, torch
from vitkit.training.processor import keep_freed_memory
assert keep_freed_memory()
def step():
    parts = [torch.ones(2_000_000) for _ in range(20)]  # 8 MB each
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert faults < 10 * 20 * 8e6 / 4096 * 0.05  # pages of 4 KiB; without it nearly all are mapped in each step
