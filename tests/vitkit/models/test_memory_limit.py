"""The bound on what building a model may take."""

import pytest
import torch

from vitkit.errors import UsageError
from vitkit.models.memory_limit import MemoryLimit

MANY = 10**6


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(MANY), lambda: torch.zeros(MANY), lambda: torch.ones(MANY), lambda: torch.full((MANY,), 2.0),
        lambda: torch.rand(MANY), lambda: torch.randn(MANY), lambda: torch.arange(MANY), lambda: torch.linspace(0, 1, MANY),
        lambda: torch.eye(1000), lambda: torch.randperm(MANY), lambda: torch.randint(9, (MANY,)),
        lambda: torch.nn.Linear(1000, 1000), lambda: [torch.zeros(1000) for _ in range(1000)],
    ],
)  # fmt: skip
def test_whatever_makes_tensors_is_counted_and_refused_beyond_the_bound(make):
    with MemoryLimit(9_000_000):
        make()
    with pytest.raises(UsageError, match="it takes more than 3,000,000 bytes"), MemoryLimit(3_000_000):
        make()


def test_what_is_made_is_the_same_as_without():
    def build():
        torch.manual_seed(0)
        return torch.nn.TransformerEncoderLayer(16, 2, 32).state_dict()

    with MemoryLimit(1_000_000):
        inside = build()
    assert all(torch.equal(value, inside[name]) for name, value in build().items())
