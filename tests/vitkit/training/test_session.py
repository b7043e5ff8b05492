"""The loop on a session, without a run directory and without a recipe."""

import io
import signal

import pytest
import torch
from comparing import Comparing
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitkit.errors import RunError, UsageError
from vitkit.training import loss_log
from vitkit.training.accelerator import make_accelerator
from vitkit.training.batches import prefetch
from vitkit.training.loop import Fit
from vitkit.training.session import Session


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.steps = nn.Linear(3, 1), []

    def set_step(self, step, total):
        self.steps.append((step, total))

    def forward(self, batch):
        loss = (self.net(batch["images"])[:, 0] - batch["labels"]).square().mean()
        return {"loss": loss, "error": loss.detach().sqrt()}


def points(count=4, size=8):
    x = torch.randn(count, size, 3, generator=torch.Generator().manual_seed(1))
    return [{"images": part, "labels": part.sum(1)} for part in x]


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    made = Session(make_accelerator("cpu", "fp32", [], tmp_path), console=Console(file=out, width=200))
    made.printed = out.getvalue
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == []


def fit(session, model, batches=None, epochs=2, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Fit(session, model, points() if batches is None else batches, epochs=epochs, optimizer=optimizer, **options)


def test_the_loop_trains_without_a_directory(session):
    model = Line()
    epochs = list(fit(session, model))
    assert [(epoch.number, epoch.step) for epoch in epochs] == [(1, 4), (2, 8)]
    assert epochs[1].losses["loss"] < epochs[0].losses["loss"]
    epochs[1].log(score=1.0)
    assert [row["epoch"] for row in session.history.losses] == [1, 2]
    assert session.history.metrics[0]["score"] == 1.0
    assert "epoch 2/2 | loss" in session.printed()


def test_a_loss_that_is_not_finite_stops_it(session):
    batches = points()
    batches[2]["images"][0, 0] = float("nan")
    with pytest.raises(RunError, match="the loss is not finite at epoch 1, batch 3: loss nan, error nan; no checkpoint was saved"):
        list(fit(session, Line(), batches))


def test_any_module_is_told_the_step_before_each_forward_pass(session):
    model = Line()
    model.child = Line()
    list(fit(session, model))
    assert model.steps == model.child.steps == [(step, 8) for step in range(8)]


def test_an_accumulated_step_is_told_once(session):
    session.grad_accum = 3
    model = Line()
    list(fit(session, model))
    assert model.steps == [(step, 4) for step in range(4)]


class Reads(TorchDispatchMode):
    """Counts the operations that wait for a device: scalars read from a tensor, and copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device(session, monkeypatch):
    """Forty steps with clipping, averaging and a schedule; losses are read once, at the end of the epoch."""
    monkeypatch.setattr(loss_log, "READ_SECONDS", 1e9)
    model = Line()
    made = fit(session, model, points(40), epochs=1, clip=1.0, ema=0.9)
    read, count = made._losses.read, []
    monkeypatch.setattr(made._losses, "read", lambda: count.append(made.progress["step"]) or read())
    monkeypatch.setattr(made, "_checkpoint", lambda path: None)  # it checks that weights are finite, once
    with Reads() as reads:
        next(iter(made))
    assert reads.names == []
    assert count == [40]
    assert made.progress["count"] == 40


def test_a_loop_that_is_left_gives_ctrl_c_back(session):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    made = iter(fit(session, Line()))
    for _ in made:
        break
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert next(made).number == 2  # it is still there


def test_prefetch_gives_the_same_batches_and_passes_errors_on():
    assert list(prefetch(iter(range(1, 100)))) == list(range(1, 100))

    def failing():
        yield 1
        raise ArithmeticError("the third batch")

    ahead = prefetch(failing())
    assert next(ahead) == 1
    with pytest.raises(ArithmeticError, match="the third batch"):
        next(ahead)


class Parts(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.weight, self.parts = nn.Parameter(torch.ones(1)), parts

    def forward(self, batch):
        return self.parts(self.weight.sum())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda w: {"loss": w, "top1": 0.5}, r"'top1' as float \(0.5\); expected a scalar tensor, for example torch.tensor\(0.5\)"),
        (lambda w: {"loss": 1.5}, r"returned 'loss' as float \(1.5\); expected a scalar tensor"),
        (lambda w: {"loss": w, "kl": None}, "returned 'kl' as NoneType; expected a scalar tensor, or leave it out"),
        (lambda w: {"loss": w, "each": torch.ones(4)}, r"'each' is a scalar; got the shape \(4,\): reduce it with mean\(\) or sum\(\)"),
        (lambda w: {"loss": w * torch.ones(4)}, r"'loss' is a scalar; got the shape \(4,\)"),
        (lambda w: {"loss": w, "step": w}, "loss part named 'step': vitkit writes a column of that name itself"),
        (lambda w: {"loss": w, "lr": w}, "loss part named 'lr'"),
        (lambda w: {"loss": w.detach()}, "'loss' does not depend on a weight that is trained"),
        (lambda w: w, "returns a dict with 'loss'; got Tensor"),
        (lambda w: None, "returns a dict with 'loss'; got NoneType"),
    ],
)
def test_what_a_model_returns_is_named_and_refused(session, parts, message):
    with pytest.raises(UsageError, match=message):
        list(fit(session, Parts(parts)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(4, 3), torch.ones(4)), "a batch is a dict of tensors, .* the loader gave a tuple: make a dict in its collate_fn"),
        ({"images": torch.ones(4, 3), "text": ["a", "b"]}, "the batch's 'text' holds a str; expected a tensor with one row per sample"),
        ({"images": torch.tensor(1.0)}, "the batch's 'images' is a tensor without dimensions"),
        ({}, "the loader gave an empty dict"),
        ("text", "the loader gave a str"),
    ],
)
def test_a_loader_of_something_else_is_refused_in_a_sentence(session, batch, message):
    with pytest.raises(UsageError, match=message):
        list(fit(session, Line(), [batch] * 2))


def test_a_batch_of_one_with_batch_norm_is_told_to_drop_it(session):
    model = Line()
    model.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    batches = [*points(2), {name: value[:1] for name, value in points(1)[0].items()}]
    with pytest.raises(UsageError, match="batch 3 of 3 has one sample, and a batch norm needs two: give drop_last=True to the batches"):
        list(fit(session, model, batches))


class Compared(Comparing):
    def uninformed(self, batch_size):
        return {"variance": float(batch_size)}


@pytest.mark.parametrize(("make", "compared"), [(Compared, 24), (lambda: Chance(1.0), 8)])
def test_uninformed_values_are_for_the_samples_that_a_step_compares(session, make, compared):
    """With three accumulated batches of eight: all of them for a model that compares their samples, else those of a batch."""
    session.grad_accum = 3
    model = make()
    list(fit(session, model, points(6), epochs=1))
    if isinstance(model, Chance):
        assert model.asked == [compared]
    else:
        assert session.history.references == {"uninformed": {"variance": compared}}


class Chance(Line):
    """A loss that stays at `value`, beside its uninformed value of ln 10."""

    def __init__(self, value):
        super().__init__()
        self.value, self.asked = value, []

    def uninformed(self, batch_size):
        self.asked.append(batch_size)
        return {"loss": 2.302585}

    def forward(self, batch):
        return {"loss": 0 * self.net.weight.sum() + self.value}


@pytest.mark.parametrize(("value", "stuck"), [(2.3, True), (2.33, True), (2.1, False), (2.6, False)])
def test_a_loss_that_stays_uninformed_is_reported_once_after_a_tenth_of_the_steps(session, value, stuck):
    model = Chance(value)
    made, numbers = fit(session, model, points(10), epochs=3), []
    for _ in made:
        numbers.append(session.printed().count("the loss is still that of a prediction that uses no information"))
    assert numbers == [int(stuck)] * 3
    assert model.asked == [8]
    assert session.history.references == {"uninformed": {"loss": 2.302585}}
    if stuck:
        assert f"after 3 of 30 steps the loss is still that of a prediction that uses no information: loss {value:.4f}" in session.printed()
