"""The README's Python examples run as they stand there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_holds_examples():
    assert {name for name, _ in BLOCKS} >= {"recipe", "plugin", "load"}


@pytest.mark.parametrize(("name", "code"), [block for block in BLOCKS if block[0] not in ("recipe",)])
def test_an_example_runs(name, code, tmp_path, monkeypatch, trained_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "jepa").symlink_to(trained_run)
    exec(compile(code, f"README.md:{name}", "exec"), {"__name__": f"readme_{name}"})
