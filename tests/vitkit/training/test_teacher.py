"""A momentum teacher and plain schedules: their equations, resuming, and several ranks."""

import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from vitkit import Run
from vitkit.errors import UsageError
from vitkit.training import MomentumTeacher, constant, cosine, linear


class Points:
    def __init__(self, size=8):
        self.size = size

    def __len__(self):
        return 4

    def epoch(self, number, *, seed=0, start=0, device="cpu", rank=0, world=1):
        for index in range(start, 4):
            x = torch.randn(self.size, 3, generator=torch.Generator().manual_seed(10 * number + index))
            yield {"images": x.tensor_split(world)[rank].to(device), "labels": torch.zeros(self.size).tensor_split(world)[rank]}


class Distilled(nn.Module):
    """The student predicts the teacher's output of another view."""

    def __init__(self, momentum):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.teacher = MomentumTeacher(self.student, momentum)
        self.stop_at = self.calls = 0

    def forward(self, batch):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        x = batch["images"]
        return {"loss": (self.student(x + 0.1) - self.teacher(x) - 1).square().mean()}


def train(out, momentum=None, stop_at=0, resume=False, **options):
    run = Run(out, device="cpu", precision="fp32", resume=resume)
    model = Distilled(cosine(0.5, 1.0) if momentum is None else momentum)
    model.stop_at = stop_at
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    history = []
    try:
        for _ in run.fit(model, Points(), epochs=2, optimizer=torch.optim.AdamW(trained, lr=0.05), **options):
            history.append(model.state_dict())
    finally:
        run.close()
    return model


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_the_teacher_follows_the_student_after_each_step():
    student = nn.Linear(2, 2)
    teacher = MomentumTeacher(student, linear(0.5, 1.0))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert [name for name, _ in teacher.named_parameters()] == ["module.weight", "module.bias"]
    expected, before = teacher.module.weight.clone(), student.weight.detach().clone()
    assert torch.equal(expected, before)
    for step in range(4):
        student.weight.data += 1.0
        teacher.after_step(step, 4)
        m = 0.5 + 0.5 * step / 4
        expected = m * expected + (1 - m) * student.weight.detach()
        torch.testing.assert_close(teacher.module.weight, expected)
    assert not teacher(torch.ones(1, 2)).requires_grad


def test_run_fit_updates_the_teacher_and_gives_it_no_gradient(tmp_path):
    frozen = train(tmp_path / "a", momentum=1.0)
    assert same(frozen.teacher.module, Distilled(1.0).student)
    copied = train(tmp_path / "b", momentum=0.0)
    assert same(copied.teacher.module, copied.student)
    assert not same(copied.student, frozen.student)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_with_a_teacher_resumes_bit_for_bit(tmp_path, ema):
    whole = train(tmp_path / "whole", ema=ema)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=6, ema=ema)
    assert same(whole, train(tmp_path / "cut", resume=True, ema=ema))


def on_ranks(rank, port, folder, parallel):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if parallel == "fsdp":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    torch.save(train(folder / "ranks").state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_have_the_teacher_of_one_device(tmp_path, parallel):
    one = train(tmp_path / "one").state_dict()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(on_ranks, (port, tmp_path, parallel), nprocs=2)
    for rank in range(2):
        states = torch.load(tmp_path / f"{rank}.pt")
        for name, value in one.items():
            torch.testing.assert_close(states[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(UsageError, match=rf"momentum is {momentum}; expected a number in \[0, 1\]"):
        MomentumTeacher(nn.Linear(1, 1), momentum)


def test_schedules_are_functions_of_the_step_and_the_steps_in_all():
    assert [constant(3.0)(step, 9) for step in (0, 4, 8)] == [3.0] * 3
    assert [linear(0.0, 1.0)(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [linear(1.0, 3.0, warmup=2)(step, 100) for step in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert cosine(0.996, 1.0)(0, 10) == pytest.approx(0.996)
    assert cosine(0.996, 1.0)(5, 10) == pytest.approx(0.998)
    assert cosine(0.04, 0.4)(3, 10) == pytest.approx(0.4 - 0.36 * (1 + math.cos(0.3 * math.pi)) / 2)
    with pytest.raises(UsageError, match="warmup is 0; expected at least 1"):
        linear(0, 1, warmup=0)


def test_a_weight_decay_schedule_sets_the_groups_that_decay(tmp_path):
    run, model = Run(tmp_path / "run", device="cpu", precision="fp32"), nn.Linear(3, 1)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer, decays = torch.optim.AdamW(groups, lr=0.1), []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, batch):
            decays.append([group["weight_decay"] for group in optimizer.param_groups])
            return {"loss": self.net(batch["images"]).square().mean()}

    list(run.fit(Model(), Points(), epochs=1, optimizer=optimizer, weight_decay=linear(0.0, 0.4)))
    run.close()
    assert decays == [[pytest.approx(0.1 * step), 0.0] for step in range(4)]
