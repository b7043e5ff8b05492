"""`vitkit doctor`: processor units, and versions with known vulnerabilities."""

import pytest

from vitkit.cli.vulnerabilities import VULNERABILITIES, known_vulnerabilities


def test_a_version_before_the_fix_is_named_with_its_effect_source_and_command():
    (line,) = known_vulnerabilities({"timm": "1.0.25"}.get)
    assert line == (
        "timm 1.0.25 has a known vulnerability: a model argument `checkpoint_path` unpickles a file, which can run code "
        "(timm 1.0.26 release notes); pip install 'timm>=1.0.26'"
    )


@pytest.mark.parametrize("version", ["2.6.0", "2.6.0+cu124", "2.10", "3", None])
def test_a_fixed_or_missing_version_is_not_named(version):
    assert known_vulnerabilities({"torch": version}.get) == []


@pytest.mark.parametrize("version", ["2.5.1+cpu", "2.5", "1.13.1", "2"])
def test_versions_compare_by_number(version):
    assert len(known_vulnerabilities({"torch": version}.get)) == 1


def test_every_hole_names_its_source():
    assert all(entry.effect and entry.source for entry in VULNERABILITIES)


def test_doctor_warns_of_known_vulnerabilities_and_is_not_broken_by_them(shell, monkeypatch):
    monkeypatch.setattr("vitkit.cli.doctor.version_of", lambda name: "1.0.0")
    answer = shell("doctor")
    assert answer.returncode == 0, answer.stdout
    assert "warning: torch 1.0.0 has a known vulnerability: torch.load runs code from a file" in answer.stdout
    assert "warning: pillow 1.0.0 has a known vulnerability: an image can overflow a buffer" in answer.stdout


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("avx2", "AVX2 for matrix products, no bf16 unit: --precision auto is fp32"),
        ("sse41", "no vector unit for matrix products, no bf16 unit: --precision auto is fp32"),
    ],
)
def test_doctor_names_the_processors_unit_and_the_precision_that_follows(shell, monkeypatch, limit, text):
    monkeypatch.setenv("VITKIT_CPU_ISA", limit)
    monkeypatch.setattr("vitkit.runs.summary.processor", lambda: "Processor With A Rather Long Name @ 2.70GHz " * 2)
    assert text in shell("doctor").stdout


def test_a_plugins_name_is_quoted_in_a_suggested_command_and_moves_no_cursor(shell, install):
    install("evil;rm -rf x\x1b[2J", "0.1", {"heads": {"x": "evil_one:X"}}, evil_one="import no_such_module")
    answer = shell("doctor")
    assert answer.returncode == 1
    assert "\x1b" not in answer.stdout + answer.stderr
    commands = [line for line in answer.stdout.splitlines() if "pip install" in line]
    assert commands == [] or all("pip install --upgrade 'evil;rm -rf x" in line for line in commands)
