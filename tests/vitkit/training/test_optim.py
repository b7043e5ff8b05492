"""Several optimisers as one, and schedules."""

import pytest
import torch
from torch import nn

from vitkit import backbones, heads
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


def test_matrices_go_to_muon_and_vectors_have_no_weight_decay():
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


class Tower(nn.Module):
    """Tokens, blocks and a norm, with the declarations that optimisers read."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def no_weight_decay(self):
        return {"cls_token"}


class Head(nn.Sequential):
    def output_weights(self):
        return {f"{len(self) - 1}.weight"}


def test_last_layers_and_declared_tokens_are_left_to_adamw_without_decay_on_the_tokens():
    model = nn.ModuleDict({"tower": Tower(), "head": Head(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))})
    muon, rest = muon_adamw(model, lr=0.01, weight_decay=0.1).optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert hidden == {"tower.embed.weight", "tower.blocks.0.weight", "tower.blocks.1.weight", "head.0.weight"}
    decayed = {names[id(p)] for group in rest.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"head.2.weight"}
    for group in adamw(model, lr=0.01, weight_decay=0.1).param_groups:
        for parameter in group["params"]:
            spared = parameter.ndim == 1 or names[id(parameter)] == "tower.cls_token"
            assert group["weight_decay"] == (0.0 if spared else 0.1), names[id(parameter)]


def test_the_registered_backbones_and_heads_declare_their_tokens_and_last_layers():
    backbone = backbones.build("multimodal_vit", img_size=8, embed_dim=16, depth=1, num_heads=1, pool="cls", registers=2)
    model = nn.ModuleList([backbone, heads.build("mlp", in_dim=16, out_dim=4), heads.build("linear", in_dim=16, out_dim=4)])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, rest = muon_adamw(model, lr=0.01).optimizers
    without = {names[id(p)] for group in rest.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {"0.vit.cls_token", "0.vit.reg_token", "0.vit.pos_embed", "0.label_type"} <= without
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert "1.layers.0.weight" in hidden
    assert not {"1.layers.3.weight", "2.linear.weight"} & hidden


@pytest.mark.parametrize("build", [adamw, muon_adamw])
def test_layer_decay_makes_learning_rates_smaller_towards_the_input(build):
    model = nn.ModuleDict({"tower": Tower(), "head": nn.Linear(4, 2)})
    optimizer = build(model, lr=1.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["head.weight"] == by_name["tower.norm.weight"] == 1.0
    assert by_name["tower.blocks.1.weight"] == by_name["tower.blocks.1.bias"] == 0.5
    assert by_name["tower.blocks.0.weight"] == 0.25
    assert by_name["tower.embed.weight"] == by_name["tower.cls_token"] == 0.125
    assert optimizer.param_groups[0]["lr"] == 1.0  # the one that is logged
    warmup_cosine(optimizer, 10, warmup=2)
    assert max(group["lr"] for group in optimizer.param_groups) == 0.5
    with pytest.raises(UsageError, match=r"layer_decay is 1.5; expected a number in \(0, 1\]"):
        build(model, lr=1.0, layer_decay=1.5)
