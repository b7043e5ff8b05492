"""Foreign text is printed as one harmless line."""

import pytest

from vitkit.errors import JOINERS, nearest, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain [bold]words[/] 猫 é", "plain [bold]words[/] 猫 é"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x1b]52;c;cm0gLXJm\x07", "\\x1b]52;c;cm0gLXJm\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("safe\rrm -rf", "safe rm -rf"),
        ("one\ntwo\tthree\u2028four\x85five", "one two three four five"),
        ("back\x08space\x00\x7f", "back\\x08space\\x00\\x7f"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2066a\u2069 \u200e \u061c", "\\u2066a\\u2069 \\u200e \\u061c"),
        ("in\u200bvisible\ufeff", "in\\u200bvisible\\ufeff"),
        ("caf\udce9.png", "caf\\udce9.png"),
        ("\U000e0041", "\\U000e0041"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        ("\\", "\\"),
        (12, "12"),
    ],
)
def test_what_moves_the_cursor_or_hides_becomes_a_visible_escape(text, line):
    assert printable(text) == line
    assert printable(line) == line


def test_no_character_reaches_the_terminal_as_a_control():
    every = "".join(map(chr, range(0x3000))) + "".join(map(chr, range(0xD800, 0xE000)))
    line = printable(every, limit=10**6)
    assert line.encode("utf-8").decode("utf-8") == line
    assert not [c for c in set(line) - set(JOINERS) if not (c.isprintable() or c.isspace())]
    assert not set(line) & set("\n\r\t\v\f\x1b\x07\x08\x85\u2028\u2029")


def test_long_text_is_cut():
    assert printable("x" * 301) == "x" * 299 + "…"
    assert printable("x" * 300) == "x" * 300
    assert printable("abc", limit=2) == "a…"


def test_an_object_whose_text_fails_is_still_named():
    class Broken(Exception):
        def __str__(self):
            raise ValueError("no")

    assert printable(Broken()) == "<Broken without text: ValueError>"


def test_near_names_are_offered():
    assert nearest("digts", ["digits", "mnist"]) == "; did you mean 'digits'?"
    assert nearest("zzz", ["digits"]) == ""
