"""Recipes: a signature becomes flags, and what cannot become one is refused with its name."""

import inspect

import pytest

from vitkit.errors import RecipeError, UsageError
from vitkit.training.recipe import Recipe, parse_arguments

GOOD = '''
"""A file."""
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

class Pool(Enum):
    CLS = "cls"
    MEAN = "mean"

def main(run, a: int, b: Annotated[float, "a half"] = 0.5, c: bool = True, d: str = "x", e: Path | None = None,
         f: Literal["p", "q"] = "p", g: Pool = Pool.CLS, h: list[int] = [1, 2], i: int | None = None):
    """Do it."""
'''


def write(tmp_path, text):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    return path


def test_typed_arguments_become_flags(tmp_path):
    recipe = Recipe(write(tmp_path, GOOD))
    assert list(recipe.flags) == list("abcdefghi")
    assert recipe.flags["a"].default is inspect.Parameter.empty
    assert recipe.flags["b"].default == 0.5
    assert recipe.name == "recipe"
    assert recipe.help == "A file.\n\nDo it."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def main(run, a: int = (\n", r"recipe.py:1: syntax error: '\(' was never closed"),
        ("x = 1", r"defines no function main\(run, ...\)"),
        ("main = 3", r"defines no function main\(run, ...\)"),
        ("def main(): pass", "has no parameters; expected `run` as the first one"),
        ("def main(a: int = 1): pass", "begins with the parameter 'a'; expected `run`"),
        ("def main(run, a=1): pass", "argument 'a' has no type; write e.g. a: int = 1"),
        ("def main(run, *a: int): pass", "cannot be a flag"),
        ("def main(run, a: dict = {}): pass", "argument 'a' has the type dict, which cannot be a flag; use int"),
        ("def main(run, a: int | str = 1): pass", "cannot be a flag"),
        ("def main(run, a: 'Nothing' = 1): pass", "annotation that cannot be resolved: name 'Nothing'"),
        ("def main(run, out: str = ''): pass", "--out belongs to every run already; rename 'out'"),
        ("import no_such_module", "cannot be read: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "cannot be read: SystemExit: 3"),
    ],
)
def test_what_cannot_be_a_recipe_says_why(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(write(tmp_path, text), reserved=frozenset({"out"}))


def test_a_missing_recipe_names_what_is_there(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"no recipe at .*recipee.py; there are .*recipe.py"):
        Recipe(tmp_path / "recipee.py")
    with pytest.raises(RecipeError, match="is a directory"):
        Recipe(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RecipeError, match="is not a Python file"):
        Recipe(tmp_path / "notes.txt")


def test_a_recipe_may_import_the_file_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("EPOCHS = 7")
    recipe = Recipe(write(tmp_path, "from beside_it import EPOCHS\ndef main(run, epochs: int = EPOCHS): pass"))
    assert recipe.flags["epochs"].default == 7


def test_arguments_of_a_component_are_json_values_or_text():
    words = ["hidden=512", "lr=1e-3", "deep=true", "act=null", "sizes=[2, 4]", 'name="7"', "norm=batch", "path=a=b", "empty="]
    assert parse_arguments(words) == {
        "hidden": 512, "lr": 1e-3, "deep": True, "act": None, "sizes": [2, 4], "name": "7", "norm": "batch",
        "path": "a=b", "empty": "",
    }  # fmt: skip
    assert parse_arguments(["x=NaN"]) == {"x": "NaN"}  # no JSON: it could not be saved
    assert parse_arguments([]) == {}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["hidden"], "an argument is NAME=VALUE, for example hidden=512; given 'hidden'"),
        (["=3"], "an argument is NAME=VALUE, for example hidden=512; given '=3'"),
        (["two words=3"], "given 'two words=3'"),
        (["a=1", "a=2"], "the argument 'a' is given twice: 1 and '2'; leave one out"),
    ],
)
def test_arguments_of_another_form_are_refused(words, text):
    with pytest.raises(UsageError, match=text):
        parse_arguments(words)
