"""Whether a model is compiled, and the one line that says so."""

import pytest
import torch
from torch import nn

from vitkit.training import compile
from vitkit.training.compile import PAYS_AFTER_STEPS, compile_for


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Modules that were told to compile; none really does."""
    told: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: told.append(self))
    monkeypatch.setattr(compile, "has_compiler", lambda: True)
    return told


@pytest.mark.parametrize(
    ("setting", "device", "steps", "does", "says"),
    [
        ("auto", "cuda", PAYS_AFTER_STEPS, True, "compiled during the first of 2,000 steps"),
        ("auto", "cuda", PAYS_AFTER_STEPS - 1, False, "not compiled: this run has 1,999 steps, and compiling saves time from 2,000 on"),
        ("auto", "cpu", 10**6, False, "not compiled: on cpu that saves almost no time in 1,000,000 steps"),
        ("on", "cpu", 1, True, "compiled during the first of 1 steps"),
        ("off", "cuda", 10**6, False, ""),
    ],
)
def test_auto_decides_by_the_length_of_the_run_and_says_so_in_one_line(compiled, setting, device, steps, does, says):
    model = nn.Linear(2, 2)
    said = compile_for(model, setting, device=device, steps=steps)
    assert (compiled == [model]) is does
    assert said.startswith(says)
    assert bool(said) is bool(says)
    assert "\n" not in said


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_without_a_compiler_it_goes_on_with_one_line(compiled, monkeypatch, tmp_path, setting):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    model = nn.Linear(2, 2)
    said = compile_for(model, setting, device="cuda", steps=10**6)
    assert said == "not compiled: no C++ compiler is installed; install g++ or clang++, or give --compile off"
    assert model(torch.ones(1, 2)).shape == (1, 2)  # as before


def test_a_compiler_is_found_where_one_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compile.sys, "platform", "linux")
    assert not compile.has_compiler()
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert compile.has_compiler()
