"""Lines and tables on a console that is not a terminal."""

import io

from rich.table import Table

from vitkit.console import PIPE_COLUMNS, TextConsole, duration


def test_a_row_stays_on_one_line_in_a_pipe_however_narrow_the_console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(show_header=False)
    table.add_row("cpu", "x" * (PIPE_COLUMNS - 20))
    monkeypatch.setattr("sys.stdout", written := io.StringIO())
    TextConsole().print(table)
    assert "x" * (PIPE_COLUMNS - 20) in written.getvalue()


def test_a_line_is_neither_wrapped_nor_read_as_markup(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", written := io.StringIO())
    TextConsole().print("[bold]" + "x" * 100)
    assert written.getvalue() == "[bold]" + "x" * 100 + "\n"


def test_durations_have_their_two_largest_units():
    assert [duration(seconds) for seconds in (0.4, 1.26, 9.7, 59.6, 3599, 3600, 90061, float("nan"))] == [
        "0.4 s", "1.3 s", "10 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "25 h 1 min", "–",
    ]  # fmt: skip
