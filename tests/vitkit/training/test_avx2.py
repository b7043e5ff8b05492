"""A processor without AVX-512, AMX and bf16 units, imitated in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor has no AVX2")

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "1"}
CODE = """
import torch
from vitkit import backbones
from vitkit.training.accelerator import resolve_precision
from vitkit.training.muon import Muon
from vitkit.training.processor import precision_note

assert torch.backends.cpu.get_cpu_capability() == "AVX2"
assert resolve_precision("auto", "cpu") == "fp32"
assert resolve_precision("bf16", "cpu") == "bf16"
assert "emulates bf16: a matrix product takes" in precision_note("bf16", "cpu")

# The public operations compute what is asked for, however slowly.
torch.manual_seed(0)
model = backbones.build("vit", img_size=8, embed_dim=32, depth=2, num_heads=2)
images = torch.randn(2, 3, 8, 8)
model.eval()
exact = model(images)
with torch.autocast("cpu", torch.bfloat16):
    rounded = model(images)
assert (rounded - exact).norm() < 0.02 * exact.norm()
model.train()
with torch.autocast("cpu", torch.bfloat16):
    model(images).float().square().mean().backward()
assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

# No iteration in a dtype that is emulated.
dtypes = set()
original = torch.baddbmm
torch.baddbmm = lambda *args, **kwargs: (dtypes.add(args[0].dtype), original(*args, **kwargs))[1]
Muon([p for p in model.blocks.parameters() if p.ndim == 2]).step()
assert dtypes == {torch.float32}, dtypes
"""


def test_bf16_works_there_and_nothing_chooses_it():
    done = subprocess.run([sys.executable, "-c", CODE], env={**os.environ, **AVX2}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
