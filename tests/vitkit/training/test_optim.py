"""Several optimisers as one, and schedules."""

import pytest
import torch
from torch import nn

from vitkit.errors import UsageError
from vitkit.training.optim import ChainedOptimizer, adamw, muon_adamw, warmup_cosine


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def train(model, optimizer, steps, start=0, schedule=None):
    for step in range(start, start + steps):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return model


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_together_they_do_what_each_does_alone():
    one, two = net(), net()
    halves = [list(two[0].parameters()), [*two[1].parameters(), *two[2].parameters()]]
    ours = [list(one[0].parameters()), [*one[1].parameters(), *one[2].parameters()]]
    together = ChainedOptimizer(torch.optim.SGD(ours[0], lr=0.1, momentum=0.9), torch.optim.AdamW(ours[1], lr=0.01))
    apart = [torch.optim.SGD(halves[0], lr=0.1, momentum=0.9), torch.optim.AdamW(halves[1], lr=0.01)]
    train(one, together, 4)
    for step in range(4):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        for optimizer in apart:
            optimizer.zero_grad()
        two(x).square().mean().backward()
        for optimizer in apart:
            optimizer.step()
    assert same(one, two)


def test_a_schedule_acts_on_all_and_training_goes_on_bit_for_bit():
    whole = net()
    optimizer = muon_adamw(whole, lr=0.01, muon_lr=0.02)
    train(whole, optimizer, 6, schedule=warmup_cosine(optimizer, 6, warmup=2))
    half = net()
    first = muon_adamw(half, lr=0.01, muon_lr=0.02)
    schedule = warmup_cosine(first, 6, warmup=2)
    assert {group["lr"] for group in first.param_groups} == {0.005, 0.01}
    train(half, first, 3, schedule=schedule)
    again = net()
    again.load_state_dict(half.state_dict())
    second = muon_adamw(again, lr=0.01, muon_lr=0.02)
    later = warmup_cosine(second, 6, warmup=2)
    second.load_state_dict(first.state_dict())
    later.load_state_dict(schedule.state_dict())
    train(again, second, 3, start=3, schedule=later)
    assert same(whole, again)


def test_matrices_go_to_muon_and_vectors_are_spared_decay():
    model = net()
    optimizer = muon_adamw(model, lr=0.01, only_adamw=[model[2].weight])
    muon, adamw = optimizer.optimizers
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model[0].weight)]
    assert [id(p) for p in adamw.param_groups[0]["params"]] == [id(model[2].weight)]
    assert adamw.param_groups[1]["weight_decay"] == 0
    model[0].weight.requires_grad_(False)
    assert len(muon_adamw(model, lr=0.01, only_adamw=[model[2].weight]).optimizers) == 1


def test_what_cannot_be_optimised():
    model = net()
    with pytest.raises(UsageError, match="two optimisers share a parameter"):
        ChainedOptimizer(*(torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)))
    with pytest.raises(UsageError, match="lr is -1"):
        muon_adamw(model, lr=-1)
    for build in (muon_adamw, adamw):
        for name, value in (("lr", -1.0), ("lr", float("nan")), ("weight_decay", -1.0), ("weight_decay", float("nan"))):
            with pytest.raises(UsageError, match=f"{name} is {value}"):
                build(model, **{"lr": 0.1, name: value})
        with pytest.raises(UsageError, match="Linear has no parameter to train: all are frozen"):
            build(nn.Linear(2, 2).requires_grad_(False), lr=0.1)


def test_a_network_of_matrices_alone_and_tied_ones():
    bare = nn.Linear(4, 2, bias=False)
    (muon,) = muon_adamw(bare, lr=0.01).optimizers
    assert muon.param_groups[0]["params"][0] is bare.weight
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    muon, rest = muon_adamw(model, lr=0.01).optimizers
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model[0].weight)]
    assert len(rest.param_groups[0]["params"]) == 2  # the biases
    before = model[0].weight.detach().clone()
    train(model, muon_adamw(model, lr=0.01), 1)
    assert not torch.equal(model[1].weight, before)
