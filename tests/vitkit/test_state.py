"""Training states: bit for bit, and checked when read."""

import pytest
import torch
from torch import nn

from vitkit.errors import CheckpointError, RunError
from vitkit.files import atomic_write, write_json
from vitkit.state import load_state, save_state

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.01),
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


def keep(path, model, optimizer, **progress):
    save_state(
        path, model_state=model.state_dict(), optimizer=optimizer.state_dict(), ema_state=None,
        scheduler={"last_epoch": 3, "lr_lambdas": [None]}, progress=progress,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path, name):
    make = OPTIMIZERS[name]
    whole, _ = trained(make, 6)
    half, optimizer = trained(make, 3)
    keep(tmp_path / "s", half, optimizer, epoch=3, mean=0.1 + 0.2)
    state = load_state(tmp_path / "s")
    again, other = trained(make, 0)
    again.load_state_dict(state.model_state)
    other.load_state_dict(state.optimizer)
    trained(make, 3, start=3, model=again, optimizer=other)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert state.progress == {"epoch": 3, "mean": 0.1 + 0.2}
    assert state.scheduler == {"last_epoch": 3, "lr_lambdas": [None]}
    assert state.ema_state is None


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "s"
    keep(path, *trained(OPTIMIZERS["adamw"], 1))
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        for content in (changed, whole[:place]):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"(is cut short.*damaged|of version .*, expected 'vitkit-state-1')"):
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
