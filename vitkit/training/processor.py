"""The vector units of this processor, and which precisions are fast with them."""

import ctypes
import functools
import os
import sys
import time

import torch
import torch.nn.functional as F

ISA_VARIABLES = ("VITKIT_CPU_ISA", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that limit the units: a value such as avx2 or avx512_core allows no bf16 unit."""
KEPT_BYTES = 512 * 2**20
"""Freed memory that the process keeps, so that a training step need not request pages from the system."""


def cpu_unit() -> str:
    """The fastest unit for matrix products that this process may use: AMX, AVX512-BF16, AVX-512, AVX2 or none."""
    units = {
        "AMX": ("_is_amx_tile_supported", "amx"),
        "AVX512-BF16": ("_is_avx512_bf16_supported", "bf16"),
        "AVX-512": ("_is_avx512_supported", "avx512"),
        "AVX2": ("_is_avx2_supported", "avx2"),
    }
    names = list(units)
    for variable in ISA_VARIABLES:
        limit = os.environ.get(variable, "").lower()
        if limit and limit != "default":
            allowed = [index for index, (_, tag) in enumerate(units.values()) if tag in limit]
            names = [name for name in list(units)[allowed[0] if allowed else len(units) :] if name in names]
    for name in names:
        check = getattr(torch.cpu, units[name][0], None)
        if check is not None and check():
            return name
    return "none"


def has_fast_bf16(device: str) -> bool:
    """Whether the device has units for bf16 products; without them bf16 is emulated, and fp32 is faster."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return device == "cpu" and cpu_unit() in ("AMX", "AVX512-BF16")


@functools.cache
def bf16_seconds_per_fp32_second(size: int = 256, rounds: int = 5) -> float:
    """How many times as long a product of `size` × `size` matrices takes in bf16 as in fp32 on this CPU; infinite if it fails.

    Measured once, at the first call, in a few hundredths of a second; forward and backward, since either may be missing.
    """

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(size, size, dtype=dtype, requires_grad=True)
        F.linear(x, x).sum().backward()
        best = float("inf")
        for _ in range(rounds):
            began = time.process_time()
            F.linear(x, x).sum().backward()
            best = min(best, time.process_time() - began)
        return max(best, 1e-6)

    try:
        return seconds(torch.bfloat16) / seconds(torch.float32)
    except RuntimeError:  # oneDNN could not create a primitive
        return float("inf")


def precision_note(precision: str, device: str) -> str:
    """One line for a run on a CPU without a unit for bf16: the speed to expect of its precision. Empty if nothing is slow."""
    if device != "cpu" or has_fast_bf16("cpu"):
        return ""
    unit = {"none": "a processor without AVX2"}.get(cpu_unit(), f"a processor with {cpu_unit()} and no bf16 unit")
    if precision == "bf16":
        cost = bf16_seconds_per_fp32_second()
        return f"{unit} emulates bf16: a matrix product takes {cost:.1f} times as long as in fp32; --precision fp32 is faster"
    return f"{unit}: the run computes in {precision}, and takes about twice as long as on one with AVX512-BF16 or AMX"


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next training step; True if it does (glibc).

    By default glibc maps new memory for every large tensor, and the system zeroes its pages each time: 4 to 10 % of a small network's step
    in fp32.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    largest_heap_block = 32 * 2**20  # glibc accepts no larger threshold
    return bool(mallopt(mmap_threshold, largest_heap_block) and mallopt(trim_threshold, KEPT_BYTES))


__all__ = ["bf16_seconds_per_fp32_second", "cpu_unit", "has_fast_bf16", "keep_freed_memory", "precision_note"]
