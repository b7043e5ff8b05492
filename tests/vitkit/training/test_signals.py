"""Ctrl-C within a step, once, twice, and as a launcher passes it on."""

import os
import signal

import pytest

from vitkit.training.signals import Interrupted, Signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_waits_for_the_step_and_a_second_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with Signals() as signals:
        with pytest.raises(Interrupted), signals.deferred():
            send(signal.SIGINT)
            assert signals.asked
            send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            signals.raise_if_asked()


def test_outside_a_step_nothing_waits() -> None:
    with Signals() as signals, pytest.raises(Interrupted):
        send(signal.SIGTERM)
    assert not signals.asked


def test_what_a_launcher_passes_on_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends SIGINT to every process, and torchrun, which got it too, SIGTERM to its ranks."""
    monkeypatch.setenv("RANK", "1")
    with Signals() as signals:
        with signals.deferred():
            send(signal.SIGINT)
            send(signal.SIGTERM)
        with pytest.raises(Interrupted), signals.deferred():
            monkeypatch.setattr("vitkit.training.signals.LAUNCHER_SECONDS", 0.0)
            send(signal.SIGINT)
