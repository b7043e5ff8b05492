"""Memory does not grow with the set: tests/benchmarks/streaming_memory.py in small."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tests" / "benchmarks" / "streaming_memory.py"
SIZE = 60_000_000

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("streaming_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_private_memory_stays_far_below_the_size_of_the_set(benchmark, tmp_path):
    assert benchmark.write(tmp_path, SIZE, 100_000, 32) == 600
    lines = list(benchmark.stream(tmp_path, batch_size=16, img_size=32, every=60))
    assert lines[-1][0] == 432  # less a fifth for testing, and a tenth of the rest for validation
    private = [used["private"] for _, _, used in lines]
    assert max(private) - private[0] < 15  # MB, of which four batches of encoded pictures would be 6.4
