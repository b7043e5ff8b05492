"""Progress: a bar on a terminal, single whole lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from vitkit.training import progress
from vitkit.training.progress import Progress

PARTS = {"loss": 0.12345, "invariance": 0.0123, "[sigreg]": 1.25}


def console(terminal, width=120):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def seen(out):
    """What was written, without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.file.getvalue())


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when told to."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_terminal_shows_epoch_share_parts_and_speed():
    out = console(True)
    with Progress(4, 50, out) as bar:
        bar.step(2, 25, PARTS, 3123.4)
    shown = seen(out)
    for text in ("epoch 2/4", "38%", "3,123 images/s", "loss 0.1235 invariance 0.0123 [sigreg] 1.2500"):
        assert text in shown
    assert out.file.getvalue().endswith("\x1b[2K")  # the bar is taken away


def test_a_narrow_terminal_keeps_what_matters_on_one_line():
    out = console(True, width=60)
    with Progress(4, 50, out) as bar:
        bar.step(2, 25, PARTS, 3123.4)
    last = [line for line in seen(out).splitlines() if "images/s" in line][-1]
    assert "epoch 2/4" in last
    assert "38%" in last
    assert "loss 0.12" in last
    assert "…" in last


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_are_printed_whole_and_as_they_are(terminal):
    out = console(terminal, width=40)
    text = "go on with: vitkit run recipe.py --out [runs]/here --resume " + "x" * 60
    with Progress(4, 50, out) as bar:
        bar.line(text)
    assert f"{text}\n" in seen(out)


def test_without_a_terminal_a_line_is_printed_every_half_minute(clock):
    out = console(False, width=40)
    with Progress(2, 100, out) as bar:
        for batch in range(1, 101):
            clock.now += 1.0
            bar.step(1, batch, PARTS, 3123.4)
    lines = [line for line in out.file.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    assert lines[0] == (
        "epoch 1/2 | batch 30/100 | loss 0.1235 invariance 0.0123 [sigreg] 1.2500 | 3,123 images/s "
        "| 15% done | 2 min 50 s left"
    )


def test_time_left_counts_only_what_this_sitting_has_done(clock):
    out = console(False)
    bar = Progress(10, 100, out)
    bar.start()
    bar.step(6, 1, PARTS, 1.0)  # resumed: half of it was done before
    clock.now += 50.0
    bar.step(6, 51, PARTS, 1.0)
    bar.stop()
    assert out.file.getvalue().rstrip().endswith("55% done | 7 min 29 s left")


def test_the_bar_is_taken_away_when_training_fails():
    out = console(True)
    with pytest.raises(ValueError, match="inside"), Progress(4, 50, out):
        raise ValueError("inside")
    assert out.file.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again


@pytest.mark.parametrize("terminal", [True, False])
def test_after_the_first_minute_one_line_says_how_long_the_run_takes(clock, terminal):
    out = console(terminal)
    with Progress(10, 100, out) as bar:
        bar.step(1, 1, PARTS, 100.0)
        clock.now += 59.0
        bar.step(1, 60, PARTS, 100.0)
        assert "another" not in seen(out)
        clock.now += 1.0
        bar.step(1, 61, PARTS, 100.0)  # 60 batches a minute: 939 are left
        clock.now += 100.0
        bar.step(2, 61, PARTS, 100.0)
    assert seen(out).count("at this rate the run takes another 15 min 39 s") == 1
    assert seen(out).count("at this rate") == 1
