"""Muon beside torch's own."""

import copy

import pytest
import torch
from torch import nn

from vitkit.errors import UsageError
from vitkit.training import muon
from vitkit.training.muon import Muon, orthogonalise

SHAPES = [(12, 4), (4, 12), (8, 8), (8, 8), (4, 12), (1, 5)]
BF16_STEP = 0.02
"""Most that a step may differ through the rounding of an iteration in bf16, as a share of its norm."""


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def train(weights, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weights


OPTIONS = {
    "defaults": {},
    "decay": {"weight_decay": 0.5},
    "adamw's scale": {"adjust_lr_fn": "match_rms_adamw"},
    "spectral": {"adjust_lr_fn": "spectral_unclamped", "momentum": 0.5},
    "without nesterov": {"nesterov": False, "ns_steps": 3},
}


@pytest.fixture(params=["bf16", "fp32"])
def dtype(request, monkeypatch):
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: request.param == "bf16")
    return request.param


@pytest.mark.parametrize("name", OPTIONS)
def test_it_takes_torchs_steps(name, dtype):
    ours, theirs, start = parameters(), parameters(), parameters()
    train(ours, Muon(ours, lr=0.1, **OPTIONS[name]), 3)
    train(theirs, torch.optim.Muon(theirs, lr=0.1, **OPTIONS[name]), 3)
    for our, their, first in zip(ours, theirs, start, strict=True):
        assert (our - their).norm() < 3 * BF16_STEP * (their - first).norm()


def test_the_iteration_in_fp32_is_that_in_fp64():
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 20)
    matrices[2, 4:] = matrices[2, :4]  # of half its rank
    coefficients = (3.4445, -4.7750, 2.0315)
    exact = orthogonalise(matrices.double(), coefficients, 5, 1e-7)
    torch.testing.assert_close(orthogonalise(matrices, coefficients, 5, 1e-7).double(), exact, atol=1e-3, rtol=1e-3)
    values = torch.linalg.svdvals(exact[:2])
    assert ((values > 0.65) & (values < 1.25)).all()
    assert not orthogonalise(torch.zeros(1, 2, 3), coefficients, 5, 1e-7).any()


def test_stacks_of_any_size_give_the_same_steps(monkeypatch, dtype):
    together, apart = parameters(), parameters()
    train(together, Muon(together), 2)
    monkeypatch.setattr(muon, "STACK_ELEMENTS", 1)
    train(apart, Muon(apart), 2)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2 if dtype == "bf16" else 1e-6, rtol=0)


def test_training_resumes_bit_for_bit_also_from_torchs_state(dtype):
    straight = parameters()
    train(straight, Muon(straight), 4)
    first = parameters()
    optimizer = Muon(first)
    train(first, optimizer, 2)
    resumed = copy.deepcopy(first)
    second = Muon(resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, second, 2, start=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    for ours, theirs in ((Muon, torch.optim.Muon), (torch.optim.Muon, Muon)):
        weights = parameters()
        optimizer = ours(weights, lr=0.1)
        train(weights, optimizer, 2)
        other = theirs(weights)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["lr"] == 0.1
        for weight in weights:
            assert torch.equal(other.state[weight]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"])


def test_parameters_without_a_gradient_stay():
    weights = parameters()
    before = weights[0].detach().clone()
    train(weights[1:], Muon(weights), 1)
    assert torch.equal(weights[0], before)


def test_arguments_out_of_range_are_answered():
    for name, value in (("lr", -1.0), ("momentum", float("nan")), ("weight_decay", -0.1)):
        with pytest.raises(UsageError, match=f"{name} is {value}; expected at least 0"):
            Muon(parameters(), **{name: value})
    with pytest.raises(UsageError, match="adjust_lr_fn is 'adam'"):
        Muon(parameters(), adjust_lr_fn="adam")
    with pytest.raises(ValueError, match=r"Muon takes matrices; a parameter has the shape \(3,\): give it to AdamW"):
        Muon([nn.Parameter(torch.zeros(3))])
