"""Training states: bit for bit, and checked when read."""

import hashlib
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn
from torch.optim import lr_scheduler

from vitkit.errors import CheckpointError, RunError
from vitkit.files import atomic_write, write_json
from vitkit.training.checkpoint import load_state, save_state
from vitkit.training.optim import ChainedOptimizer

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "several": lambda p: ChainedOptimizer(torch.optim.AdamW(p[:2]), torch.optim.SGD(p[2:], lr=0.01, momentum=0.9)),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], betas=(0.8, 0.9)),
}


def trained(make, steps, start=0, model=None, optimizer=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = optimizer or make(list(model.parameters()))
    for step in range(start, start + steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


def keep(path, model, optimizer, schedule=None, **progress):
    save_state(
        path,
        model_state=model.state_dict(),
        optimizer=optimizer.state_dict(),
        ema_state=None,
        scheduler=None if schedule is None else schedule.state_dict(),
        progress=progress,
    )


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path, name):
    make = OPTIMIZERS[name]
    whole, _ = trained(make, 6)
    half, optimizer = trained(make, 3)
    keep(tmp_path / "s", half, optimizer, epoch=3, mean=0.1 + 0.2)
    state = load_state(tmp_path / "s")
    again, other = trained(make, 0)
    state.restore(again, other, None, None)
    trained(make, 3, start=3, model=again, optimizer=other)
    assert same(whole, again)
    assert state.progress == {"epoch": 3, "mean": 0.1 + 0.2}
    assert (state.scheduler, state.ema_state) == (None, None)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)


def in_sequence(optimizer):
    warmup = lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 5)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 10)], milestones=[4])


def in_steps(optimizer):
    return lr_scheduler.MultiStepLR(optimizer, [2, 5, 5, 7], gamma=0.5)


@pytest.mark.parametrize("make", [one_cycle, in_sequence, in_steps])
def test_a_schedule_goes_on_bit_for_bit(tmp_path, make):
    def go(schedule, optimizer, steps):
        rates = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    def built():
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, make(optimizer)

    _, optimizer, schedule = built()
    whole = go(schedule, optimizer, 12)
    model, optimizer, schedule = built()
    first = go(schedule, optimizer, 3)
    keep(tmp_path / "s", model, optimizer, schedule)
    model, optimizer, schedule = built()
    load_state(tmp_path / "s").restore(model, optimizer, None, schedule)
    assert first + go(schedule, optimizer, 9) == whole


def test_values_of_every_kind_come_back_bit_for_bit(tmp_path):
    model_state = {
        "bf16": torch.randn(3, 2).bfloat16(),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "step": torch.tensor(7.0),
        "none": torch.zeros(0, 4),
        "turned": torch.arange(6).view(2, 3).T,
        "bool": torch.tensor([True, False]),
    }
    optimizer = {
        "state": {0: {"a": model_state["step"], "b": None}, (1, "x"): [1, 2.5, float("inf"), "text", True]},
        "t": (1, (2,)),
    }
    progress = {"sha256": '"sha256":"' + "0" * 64 + '"', "quote": '"\\'}
    save_state(
        tmp_path / "s", model_state=model_state, optimizer=optimizer, ema_state=None, scheduler=None, progress=progress
    )
    state = load_state(tmp_path / "s")
    for name, value in model_state.items():
        found = state.model_state[name]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert (
            found.contiguous().flatten().view(torch.uint8).tolist()
            == value.contiguous().flatten().view(torch.uint8).tolist()
        )
    assert state.optimizer == optimizer
    assert isinstance(state.optimizer["t"][1], tuple)
    assert state.progress == progress


def test_it_is_a_safetensors_file_that_others_can_read(tmp_path):
    model, optimizer = trained(OPTIMIZERS["adamw"], 1)
    keep(tmp_path / "s", model, optimizer)
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.metadata()["format"] == "vitkit-state-1"
        assert len(file.keys()) == len(model.state_dict()) + 3 * len(list(model.parameters()))


def test_a_state_that_does_not_fit_is_refused_with_the_way_out(tmp_path):
    model, optimizer = trained(OPTIMIZERS["adamw"], 2)
    schedule = lr_scheduler.ConstantLR(optimizer)
    keep(tmp_path / "s", model, optimizer, schedule)
    state = load_state(tmp_path / "s")
    way = "; resume with the recipe and the arguments that the run was started with"
    for other, other_optimizer, average, other_schedule, message in (
        (nn.Linear(3, 4), optimizer, None, schedule, "belongs to another model or optimiser: .*Missing key"),
        (
            model,
            trained(OPTIMIZERS["groups"], 0)[1],
            None,
            schedule,
            "belongs to another model or optimiser: .* parameter groups",
        ),
        (model, trained(OPTIMIZERS["sgd"], 0)[1], None, schedule, "belongs to another optimiser: it has no dampening, momentum"),
        (model, trained(OPTIMIZERS["several"], 0)[1], None, schedule, "belongs to another model or optimiser: "),
        (model, optimizer, nn.Identity(), schedule, "this run has averaged weights, the checkpoint has none"),
        (model, optimizer, None, None, "the checkpoint has a schedule, this run has none"),
    ):
        with pytest.raises(CheckpointError, match=f"{message}.*{way}"):
            state.restore(other, other_optimizer, average, other_schedule)


def test_other_files_are_no_training_states(tmp_path):
    path = tmp_path / "s"
    for content in (b"", b"x", pickle.dumps({"a": 1}), to_bytes({"a": torch.zeros(2)}), b"\x02" + b"\0" * 7 + b"[]"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is cut short, damaged or no training state; delete it"):
            load_state(path)
    path.write_bytes(to_bytes({}, metadata={"format": "vitkit-state-9", "tree": "", "sha256": ""}))
    with pytest.raises(CheckpointError, match="of version 'vitkit-state-9', expected 'vitkit-state-1'"):
        load_state(path)
    nested = '{"dict":[["a",' * 2000 + "1" + "]]}" * 2000
    for tree in ("[1]", "{}", '{"tensor": "7"}', '{"dict": 3}', '{"dict": [["a", 1]]}', nested):
        body = to_bytes({}, metadata={"format": "vitkit-state-1", "tree": tree, "sha256": "0" * 64})
        path.write_bytes(body.replace(b"0" * 64, hashlib.sha256(body).hexdigest().encode()))
        with pytest.raises(CheckpointError, match="is no training state: "):
            load_state(path)


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "s"
    keep(path, *trained(OPTIMIZERS["adamw"], 1))
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        for content in (changed, whole[:place]):
            path.write_bytes(content)
            with pytest.raises(
                CheckpointError, match=r"(is cut short.*damaged|of version .*, expected 'vitkit-state-1')"
            ):
                load_state(path)
    with pytest.raises(CheckpointError, match="cannot read .*nowhere"):
        load_state(tmp_path / "nowhere")


def test_a_state_holds_tensors_and_json_alone(tmp_path):
    with pytest.raises(CheckpointError, match="holds tensors and JSON values; given object"):
        save_state(
            tmp_path / "s", model_state={}, optimizer={"a": object()}, ema_state=None, scheduler=None, progress={}
        )
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": null\n}\n'
    with pytest.raises(ValueError, match="inside"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ValueError("inside")
    with pytest.raises(RunError, match="cannot write .*file.json: No space left on device; free some room"):
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert "null" in path.read_text()


def test_a_full_disk_ends_a_run_with_one_message(tmp_path):
    """/dev/full refuses every byte; a directory cannot be mounted in a test, so the write itself is sent there."""
    with pytest.raises(RunError, match="No space left on device; free some room, or choose another --out"):
        with atomic_write(tmp_path / "x"), open("/dev/full", "w") as full:
            full.write("x" * 10_000)
            full.flush()
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import resource, sys, torch
from vitkit.training.checkpoint import load_state, save_state

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB

states = {str(number): torch.ones(2**22) for number in range(4)}  # 64 MiB
optimizer = {"state": {0: torch.ones(2**23)}}  # 32 MiB
before = peak()
save_state(sys.argv[1], model_state=states, optimizer=optimizer, ema_state=None, scheduler=None, progress={})
saved = peak()
del states, optimizer
load_state(sys.argv[1])
print(saved - before, peak() - saved)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is a module of Unix")
def test_a_checkpoint_is_never_in_memory_twice(tmp_path):
    """Saving takes far less than another copy of 96 MiB; reading takes one copy and the mapped file, page by page."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "s")], capture_output=True, text=True, check=True)
    saving, reading = map(int, done.stdout.split())
    assert saving < 48
    assert reading < 144
