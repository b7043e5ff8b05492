"""A recipe under torchrun: two processes, one run directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = ("--dataset", "digits", "--epochs", "1", "--emb-dim", "16", "--depth", "1", "--num-heads", "2", "--train-size", "70",
         "--batch-size", "8", "--grad-accum", "2", "--device", "cpu", "--precision", "fp32")  # fmt: skip


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "jepa_mnist.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitkit", "run"]
    done = subprocess.run(
        [*launch, str(recipe), *FLAGS], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (directory,) = (tmp_path / "runs" / "jepa_mnist").iterdir()
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["settings"]["processes"] == 2
    assert summary["steps"] == 2  # 70 images: four batches of 8 + 8, two a step
    assert summary["protocols"]["linear_top1"]["samples"] == 355
    assert (directory / "model.safetensors").exists()
    assert done.stderr.count("epoch 1/1") == 1
