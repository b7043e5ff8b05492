"""Ctrl-C within a step, once, twice, and as a launcher passes it on."""

import os
import signal
import subprocess
import sys
import textwrap
import time

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_of_these_signals_asks_and_its_handler_is_restored(number: signal.Signals) -> None:
    inherited = signal.signal(number, signal.SIG_DFL)  # whoever started the tests may ignore it
    try:
        with Signals() as signals:
            with pytest.raises(Interrupted), signals.deferred():
                send(number)
                signals.raise_if_asked()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_ctrl_c_counts_although_a_shell_ignores_it_for_jobs_in_the_background() -> None:
    inherited = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals(), pytest.raises(Interrupted):
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(signal.SIGHUP)
            assert not signals.asked
    finally:
        signal.signal(signal.SIGHUP, before)


CHILD = """
    import sys, time
    from vitkit.training.signals import Signals
    end = time.monotonic() + SECONDS
    with Signals() as signals:
        print(signals.asked, flush=True)
        while not signals.asked and time.monotonic() < end:
            time.sleep(0.05)
        open(sys.argv[1], "w").write(str(signals.asked))
"""


@pytest.mark.parametrize("launched", [True, False])
def test_the_death_of_torchrun_asks_its_ranks_to_stop(tmp_path, launched: bool) -> None:
    """A launcher that starts a rank, and is killed."""
    child = textwrap.dedent(CHILD).replace("SECONDS", "60" if launched else "1")
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, {str(tmp_path / 'asked')!r}])"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": "one"} if launched else {}
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "False\n"
        started.kill()
        for _ in range(400):
            time.sleep(0.05)
            if (tmp_path / "asked").exists() and (tmp_path / "asked").read_text():
                break
    assert (tmp_path / "asked").read_text() == str(launched)
