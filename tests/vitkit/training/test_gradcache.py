"""Parts of a batch put together: its loss and its gradient, with what was dropped the first time."""

import pytest
import torch
from comparing import Comparing
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit.training.gradcache import Accumulated, GradCache, GradCacheable


def batches(sizes=(8, 8, 3)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(size, 3, generator=generator) for size in sizes]
    return [{"images": x, "labels": x.sum(1)} for x in images]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def gradient(model: nn.Module, call) -> tuple[dict[str, Tensor], list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)
    parts = call(model)
    parts["loss"].backward()
    return {name: value.detach() for name, value in parts.items()}, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "call",
    [
        lambda model: Accumulated(model)(batches(), [1, 2, 3]),
        lambda model: Accumulated(model)([joined(batches())], [1]),
        lambda model: GradCache(model, 4)(joined(batches())),
        lambda model: GradCache(model, 100)(joined(batches())),
        lambda model: Accumulated(GradCache(model, 3))(batches(), [1, 2, 3]),  # chunks of accumulated batches
    ],
)
def test_the_loss_and_the_gradient_are_those_of_one_batch(call):
    torch.manual_seed(0)
    model = Comparing()
    torch.testing.assert_close(gradient(model, call), gradient(model, lambda model: model(joined(batches()))))


@pytest.mark.parametrize(
    ("call", "times"),
    [
        (lambda model: Accumulated(model)(batches(), [1, 2, 3]), 3),
        (lambda model: GradCache(model, 10)(joined(batches())), 2),
    ],
)
def test_recomputed_features_drop_the_same_units(monkeypatch, call, times):
    torch.manual_seed(0)
    model, calls = Comparing(dropout=0.5), []
    compute = model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda batch: calls.append(1) or compute(batch))
    again = gradient(model, call)
    assert len(calls) == 2 * times
    monkeypatch.setattr("vitkit.training.gradcache.recompute", lambda function, batch, use_reentrant: function(batch))
    torch.testing.assert_close(again, gradient(model, call))
    assert len(calls) == 3 * times


def test_without_gradients_features_are_computed_once(monkeypatch):
    model, calls = Comparing(), []
    compute = model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda batch: calls.append(1) or compute(batch))
    with torch.no_grad():
        GradCache(model, 10)(joined(batches()))
    assert len(calls) == 2


def test_what_a_gradient_cache_needs():
    assert isinstance(Comparing(), GradCacheable)
    assert isinstance(GradCache(Comparing(), 2), GradCacheable)
    with pytest.raises(UsageError, match="chunk is 0; expected at least 1"):
        GradCache(Comparing(), 0)
    with pytest.raises(UsageError, match="Linear is not GradCacheable: a gradient cache needs a model that inherits from"):
        GradCache(nn.Linear(1, 1), 2)
