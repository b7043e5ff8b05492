"""Pictures that are their own number, digits as shards, and recipes that are run."""

import json
from pathlib import Path

import numpy as np
import pytest

from vitkit import datasets
from vitkit.cli.run import run
from vitkit_streams.writing import write_shards

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def shards(tmp_path):
    """80 pictures whose grey value is their number, in 8 shards."""
    pictures = [np.full((8, 8), number, dtype=np.uint8) for number in range(80)]
    write_shards(tmp_path / "shards", pictures, [number % 4 for number in range(80)], per_shard=10)
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """300 of scikit-learn's digits as shards with a damaged picture among them, and the flags that name them."""
    folder = tmp_path_factory.mktemp("digits")
    some = datasets.build("digits").train.stratified_subset(300)
    pictures, labels = some.images[:, 0].numpy(), some.labels.tolist()
    paths = write_shards(folder / "shards", pictures[:240], labels[:240], per_shard=40)
    write_shards(folder / "test", pictures[240:], labels[240:])
    body = paths[0].read_bytes()
    paths[0].write_bytes(body.replace(b"IHDR", b"JUNK", 1))
    words = {"urls": folder / "shards", "test_urls": folder / "test", "img_size": 16, "channels": 1, "cache": folder / "cache"}
    return [word for name, value in words.items() for word in ("--dataset-arg", f"{name}={value}")]


@pytest.fixture
def train():
    """`train("jepa_mnist.py", directory, *flags)`: the summary of a run."""

    def run_it(recipe, directory, *flags, code=0):
        with pytest.raises(SystemExit) as leaving:
            run(RECIPES / recipe, [*flags, "--out", str(directory)])
        assert leaving.value.code == code
        return json.loads((directory / "summary.json").read_text())

    return run_it
