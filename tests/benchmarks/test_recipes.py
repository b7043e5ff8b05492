"""Ratios of a recipe's step and evaluation on a processor without bf16 units; never absolute times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.recipes import AVX2, PARTS

TESTS = Path(__file__).parents[1]
CODE = """
import json, torch
from benchmarks.recipes import RECIPES, measure
torch.set_num_threads(1)
print(json.dumps(measure(RECIPES / "jepa_mnist.py", {"dataset": "digits"}, rounds=5)))
"""


@pytest.mark.slow
def test_with_avx2_only_the_network_takes_the_step_and_training_takes_the_run():
    environment = {**os.environ, **AVX2, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True)
    m = json.loads(done.stdout.splitlines()[-1])
    assert m["precision"] == "fp32"
    assert sum(m[part] for part in PARTS) == pytest.approx(m["step"], rel=0.2)  # medians of each part
    assert m["augmentation"] + m["optimiser"] + m["average"] < 0.2 * m["step"]  # with torch's Muon 0.6
    assert m["ceiling"] > 0.6 * m["step"]
    assert m["evaluation"] < 0.25 * m["steps"] * m["step"]
