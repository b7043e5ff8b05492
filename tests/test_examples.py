"""The Python examples of the READMEs run as they stand there."""

import re
from pathlib import Path

import pytest

import vitkit
from vitkit.cli.run import run
from vitkit.data import build

ROOT = Path(__file__).parent.parent
READMES = [ROOT / folder / "README.md" for folder in (".", "plugins", "vitkit/data", "vitkit/models")]
BLOCKS = [
    block
    for readme in READMES
    for block in re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
]


def test_the_readmes_hold_examples():
    assert {name for name, _ in BLOCKS} >= {"recipe", "plugin", "load", "use"}



def test_every_relative_link_of_a_readme_leads_somewhere():
    for readme in ROOT.rglob("README.md"):
        if ".venv" in readme.parts:
            continue
        for target in re.findall(r"\]\(([^)#]+)", readme.read_text(encoding="utf-8")):
            assert "://" in target or (readme.parent / target).exists(), f"{readme}: {target}"


@pytest.mark.parametrize(("name", "code"), [block for block in BLOCKS if block[0] != "recipe"])
def test_an_example_runs(name, code, tmp_path, monkeypatch, trained_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "jepa").symlink_to(trained_run)
    exec(compile(code, f"README.md:{name}", "exec"), {"__name__": f"readme_{name}"})


def test_the_recipe_trains_a_model_that_predicts(tmp_path):
    (tmp_path / "first.py").write_text(dict(BLOCKS)["recipe"], encoding="utf-8")
    with pytest.raises(SystemExit) as leaving:
        run(tmp_path / "first.py", ["--dataset", "digits", "--epochs", "8", "--lr", "3e-3", "--out", str(tmp_path / "run")])
    assert leaving.value.code == 0
    model, digits = vitkit.load(tmp_path / "run"), build("digits").test
    found = model.predict(digits.images, top=1)
    hits = sum(int(one.label) == label for one, label in zip(found, digits.labels.tolist(), strict=True))
    assert hits / len(found) > 0.6
    assert found[0].measure == "probability"
