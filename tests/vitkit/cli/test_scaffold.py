"""`vitkit new`: names are checked, nothing is overwritten, nothing is written in part."""

import sys
import tomllib

import pytest

from vitkit.cli.main import main
from vitkit.cli.scaffold import new_plugin, new_recipe
from vitkit.errors import RunDirectoryError, RunError, UsageError
from vitkit.registry import KINDS, REGISTRIES
from vitkit.training.recipe import Recipe


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_declares_its_component_under_its_kind(kind, tmp_path):
    folder = new_plugin("my-thing", kind, tmp_path / "deep")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"LICENSE", "README.md", "pyproject.toml", "src/my_thing/__init__.py", "tests/test_my_thing.py"}
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    factory = "my_thing" if kind == "dataset" else "MyThing"
    assert project["entry-points"] == {REGISTRIES[kind].group: {"my_thing": f"my_thing:{factory}"}}
    for file in files:
        text = (folder / file).read_text()
        compile(text, file, "exec") if file.endswith(".py") else None
        assert "$" not in text
        assert max(map(len, text.splitlines())) <= 125
    assert [path.name for path in folder.parent.iterdir()] == ["my-thing"]


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("my-head", "hed", "no kind named 'hed'; did you mean 'head'"),
        ("My-Head", "head", "lower-case words and digits, joined by hyphens, such as my-head; given 'My-Head'"),
        ("../up", "head", "given '../up'"),
        ("2heads", "head", "given '2heads'"),
        ("class", "loss", "'class' is a module of Python; choose another name, such as class-loss"),
        ("json", "loss", "'json' is a module of Python"),
        ("torch", "head", "a distribution torch .* is installed already; choose another name"),
        ("vitkit-vit", "head", "a module 'vitkit_vit' is installed already, and only one of the two could be imported"),
        ("mlp", "head", "the head 'mlp' is registered by vitkit already"),
    ],
)
def test_names_are_checked(name, kind, text, tmp_path):
    with pytest.raises(UsageError, match=text):
        new_plugin(name, kind, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_never_overwritten(tmp_path):
    (tmp_path / "my-head").mkdir()
    with pytest.raises(RunDirectoryError, match="my-head exists already; choose another name or --out"):
        new_plugin("my-head", "head", tmp_path)
    assert list((tmp_path / "my-head").iterdir()) == []
    (tmp_path / "mine.py").write_text("kept")
    with pytest.raises(RunDirectoryError, match=r"mine.py exists already"):
        new_recipe("mine", tmp_path)
    assert (tmp_path / "mine.py").read_text() == "kept"
    with pytest.raises(RunError, match=r"cannot write into .*mine.py/below"):
        new_plugin("my-head", "head", tmp_path / "mine.py" / "below")


def test_a_recipes_name_is_checked(tmp_path):
    for name in ("my recipe", "../up", "class", "a-b"):
        with pytest.raises(UsageError, match="a recipe's name is a Python name such as my_recipe"):
            new_recipe(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_recipe_runs_on_digits_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert {"head", "head_arg", "dataset"} <= set(Recipe(new_recipe("other.py", tmp_path)).flags)
    for words, text in (
        (["new", "recipe", "mine"], "mine.py is a recipe. Next:\n  vitkit run mine.py"),
        (["run", "mine.py", "--epochs", "2", "--eval-every", "2", "--head", "mlp", "--head-arg", "depth=1", "--out", "run"], ""),
    ):
        monkeypatch.setattr(sys, "argv", ["vitkit", *words])
        with pytest.raises(SystemExit) as leaving:
            main()
        assert leaving.value.code == 0
        assert text in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists()
