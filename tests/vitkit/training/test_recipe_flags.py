"""A recipe's datasets, presets, components and aliases as flags, and what a run records of them."""

import json
import re

import pytest

from vitkit.errors import RecipeError
from vitkit.registry import Component
from vitkit.training.recipe import Recipe

RECIPE = '''
"""Tells digits apart."""
import json
from typing import Annotated, Literal
import torch
from vitkit import Component, Run
from vitkit.contracts import Dataset

DATASET = "mnist"
PRESETS = {"quick": {}, "full": {"epochs": 4, "head": Component("head", "linear")}, "digits": {"epochs": 2}}
ALIASES = {"emb_dim": "embed_dim", "objective": {"seed": "reference"}, "flip": "mirror",
           "hidden": "head.hidden", "small": "head.hidden=2", "norm": {"no": "", "batch": "head.norm=batch"}}

class Model(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head
    def forward(self, batch):
        return {"loss": torch.nn.functional.cross_entropy(self.head(batch["images"].flatten(1)), batch["labels"])}

def main(
    run: Run,
    data: Dataset,
    epochs: Annotated[int, "passes over the training images"] = 1,
    embed_dim: int = 8,
    objective: Literal["joint", "reference"] = "joint",
    head: Annotated[Component, "maps pixels to logits"] = Component("head", "mlp", hidden=16),
    mirror: bool = False,
    debug: bool = False,
    context: str = "none",
):
    """Train."""
    got = [data.name, epochs, embed_dim, objective, head.name, head.kwargs, mirror, debug, context]
    print("GOT " + json.dumps(got))
    model = Model(head.build(in_dim=64, out_dim=10))
    for epoch in run.fit(model, data.train.batches(512), epochs=epochs, optimizer=torch.optim.SGD(model.parameters(), 0.1)):
        epoch.log(a=1.0)
    run.save(model)
'''
DEFAULTS = ["digits", 2, 8, "joint", "mlp", {"hidden": 16}, False, False, "none"]


@pytest.fixture
def run(shell, tmp_path):
    """`run(flags...)` in a directory with the recipe: what `main` got, and the run's summary."""
    (tmp_path / "small.py").write_text(RECIPE)

    def call(*flags, file="small.py", out="run"):
        done = shell("run", file, *flags, "--out", out, "--device", "cpu", "--precision", "fp32")
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("GOT ")]
        return json.loads(line[4:]), json.loads((tmp_path / out / "summary.json").read_text())

    return call


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        ("--preset quick", {1: 1}),
        ("--preset full", {1: 4, 4: "linear", 5: {}}),
        ("--preset full --epochs 1", {1: 1, 4: "linear", 5: {}}),
        ("--preset full --head mlp --epochs 1", {1: 1, 5: {}}),
        ("--head-arg hidden=4 --head-arg norm=batch", {5: {"hidden": 4, "norm": "batch"}}),
        ("--head linear", {4: "linear", 5: {}}),
        ("--head mlp", {}),
        ("--emb-dim 3 --objective seed --flip --debug --context x", {2: 3, 3: "reference", 6: True, 7: True, 8: "x"}),
        ("--emb-dim=3 --objective=seed --no-flip", {2: 3, 3: "reference"}),
        ("--hidden 4", {5: {"hidden": 4}}),
        ("--hidden=4", {5: {"hidden": 4}}),
        ("--small", {5: {"hidden": 2}}),
        ("--no-small --norm no", {}),
        ("--norm=batch --flip", {5: {"hidden": 16, "norm": "batch"}, 6: True}),
    ],
)
def test_values_are_resolved_before_main_is_called(run, flags, changed):
    expected = [changed.get(place, value) for place, value in enumerate(DEFAULTS)]
    assert run("--dataset", "digits", *flags.split())[0] == expected


def test_the_summary_keeps_requested_and_resolved_values(run, tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path))
    got, summary = run("--emb-dim", "3")
    assert got[:3] == ["digits", 2, 3]  # mnist is not available
    assert summary["dataset"]["asked"] == "auto"
    assert {name: summary["requested"][name] for name in ("preset", "epochs", "embed_dim", "head", "dataset")} == {
        "preset": "auto", "epochs": None, "embed_dim": 3, "head": None, "dataset": "auto",
    }  # fmt: skip
    assert {name: summary["arguments"][name] for name in ("preset", "epochs", "embed_dim", "head")} == {
        "preset": "digits", "epochs": 2, "embed_dim": 3, "head": "mlp",
    }  # fmt: skip


def test_a_run_of_earlier_flags_is_resumed_and_another_value_refused(run, shell, tmp_path):
    _, summary = run("--dataset", "digits", "--epochs", "1", "--embed-dim", "3", "--objective", "reference")
    for values in (summary["arguments"], summary["requested"]):  # as before the flags were renamed
        values["emb_dim"], values["objective"] = values.pop("embed_dim"), "seed"
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    refused = shell("run", "small.py", "--out", "run", "--resume", "--embed-dim", "4")
    assert refused.returncode == 2
    assert "--embed-dim was 3 when run was started and is now 4; leave the flag out to resume" in refused.stderr
    refused = shell("run", "small.py", "--out", "run", "--resume", "--preset", "quick")
    assert "--preset was 'auto' when run was started and is now 'quick'" in refused.stderr
    got, summary = run("--resume", "--preset", "digits", "--emb-dim", "3", "--objective", "seed")
    assert got == ["digits", 1, 3, "reference", *DEFAULTS[4:]]
    assert summary["status"] == "finished"


def test_a_run_with_earlier_flags_that_are_component_arguments_today_is_resumed(run, tmp_path):
    got, summary = run("--dataset", "digits", "--epochs", "1", "--hidden", "4", "--norm", "batch")
    assert got[5] == {"hidden": 4, "norm": "batch"}
    for values in (summary["arguments"], summary["requested"]):  # as before the flags were moved
        values.pop("head_arg")
        values |= {"hidden": 4, "norm": "batch", "small": False}
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    got, summary = run("--resume")
    assert got[5] == {"hidden": 4, "norm": "batch"}
    assert summary["arguments"]["head_arg"] == ["hidden=4", "norm=batch"]


def test_a_run_with_presets_and_components_is_reproduced(run, shell):
    run("--dataset", "digits", "--emb-dim", "3", "--head-arg", "hidden=4")
    done = shell("reproduce", "run", "--yes", "--out", "again")
    assert done.returncode == 0, done.stderr
    assert json.dumps(["digits", 2, 3, "joint", "mlp", {"hidden": 4}, False, False, "none"]) in done.stdout


def test_help_lists_presets_and_components_and_no_alias(run, shell):
    text = re.sub(r"[\s│]+", " ", shell("run", "small.py", "--help").stdout)
    for words in (
        "--preset <auto|quick|full|digits> values for flags that you do not set; auto: the preset with the name of the dataset "
        "if there is one, else quick [default: auto]",
        "--epochs <int> passes over the training images [default: 1; preset full: 4; preset digits: 2]",
        "--head NAME maps pixels to logits (a registered head) [default: mlp; preset full: linear]",
        "--head-arg NAME=VALUE an argument for --head; may be repeated [default: hidden=16]",
        "--dataset NAME a registered or imported dataset; auto: mnist, or digits if it is not available",
        "--dataset-arg NAME=VALUE an argument for the dataset; may be repeated",
    ):
        assert words in text
    assert "emb-dim" not in text.replace("embed-dim", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def main(run, help: bool = False): pass", "--help belongs to every run already; rename 'help'"),
        ("def main(run, a: Dataset, b: Dataset): pass", "a and b are datasets; the runner builds one, build others in main"),
        ("def main(run, a: Dataset, dataset: str = ''): pass", "the runner makes the flag --dataset; rename the argument 'dataset'"),
        ("def main(run, a: Component): pass", r"'a' needs a default component, e.g. a: Component = Component\('head', 'mlp'\)"),
        (
            "def main(run, a: Component = Component('head', 'mlp'), a_arg: int = 1): pass",
            "the runner makes the flag --a-arg; rename the argument 'a_arg'",
        ),
        ("PRESETS = {'x': 3}\ndef main(run): pass", "PRESETS in .* is {'x': 3}; expected a dict of dicts"),
        (
            "PRESETS = {'x': {'epoch': 3}}\ndef main(run, epochs: int = 1): pass",
            "'x' sets 'epoch', which main does not take; did you mean 'epochs'",
        ),
        ("PRESETS = {'x': {'a': 3}}\ndef main(run, a: int): pass", "'x' sets 'a', which has no default; give it one in main"),
        ("PRESETS = {'x': {'a': 'y'}}\ndef main(run, a: int = 1): pass", "'x' sets a to 'y'; expected int"),
        ("ALIASES = {'b': 'aa'}\ndef main(run, a: int = 1): pass", "ALIASES in .*: 'aa' is not a flag"),
        ("ALIASES = {'b': 'c.d'}\ndef main(run, a: int = 1): pass", "ALIASES in .*: 'c_arg' is not a flag"),
        ("ALIASES = {'b': {'x': 'c.d=1'}}\ndef main(run, a: int = 1): pass", "ALIASES in .*: 'c_arg' is not a flag"),
        ("ALIASES = {'b': {'x': 'y'}}\ndef main(run, a: int = 1): pass", "ALIASES in .*: 'y' is not a flag"),
        ("ALIASES = {'b': 'a'}\ndef main(run, a: int = 1, b: int = 1): pass", "'b' is a flag already; an alias is an earlier name"),
    ],
)
def test_constants_and_arguments_that_do_not_fit_say_why(tmp_path, text, message):
    path = tmp_path / "recipe.py"
    path.write_text(f"from vitkit import Component\nfrom vitkit.contracts import Dataset\n{text}")
    with pytest.raises(RecipeError, match=message):
        Recipe(path)


def test_a_recipe_that_resolves_its_presets_itself_keeps_its_flags(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("PRESETS = {'a': {'any': 1}}\ndef main(run, dataset: str = 'digits', preset: str = 'a'): pass")
    recipe = Recipe(path)
    assert list(recipe.flags) == ["dataset", "preset"]
    assert recipe.presets == {}


def test_a_component_builds_with_its_own_arguments_first():
    head = Component("head", "mlp", hidden=4, norm="batch").build(in_dim=3, out_dim=2, hidden=7)
    assert head.spec.kwargs == {"in_dim": 3, "out_dim": 2, "hidden": 4, "norm": "batch"}


HELPERS = '''
import torch
from vitkit import Run
import beside
from vitkit.training import adamw
def main(run: Run, epochs: int = beside.EPOCHS):
    from lazy.inner import WIDTH
    model = beside.Model(WIDTH)
    for epoch in run.fit(model, [{"images": torch.ones(4, 3)}] * 2, epochs=epochs, optimizer=adamw(model, lr=0.1)):
        epoch.log(width=float(WIDTH))
'''
BESIDE = '''
import torch
EPOCHS = 1
class Model(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Linear(3, width)
    def forward(self, batch):
        return {"loss": self.net(batch["images"]).square().mean()}
'''


def test_modules_beside_a_recipe_are_copied_with_it_and_the_copy_runs(shell, tmp_path):
    folder = tmp_path / "source"
    (folder / "lazy").mkdir(parents=True)
    for name, text in (("r.py", HELPERS), ("beside.py", BESIDE), ("lazy/__init__.py", ""), ("lazy/inner.py", "WIDTH = 2")):
        (folder / name).write_text(text)
    (folder / "unused.py").write_text("")
    flags = ("--device", "cpu", "--precision", "fp32")
    done = shell("run", "source/r.py", "--out", "run", *flags)
    assert done.returncode == 0, done.stderr
    copied = {path.relative_to(tmp_path / "run" / "modules").as_posix() for path in (tmp_path / "run" / "modules").rglob("*.py")}
    assert copied == {"beside.py", "lazy/__init__.py", "lazy/inner.py"}
    folder.rename(tmp_path / "gone")
    for words in (
        ("run", "run/recipe.py", "--out", "again", *flags),
        ("reproduce", "run", "--yes", "--out", "twice"),
        ("run", "run/recipe.py", "--out", "run", "--overwrite", *flags),
        ("run", "run/recipe.py", "--out", "third", *flags),
    ):
        done = shell(*words)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("flags", "code"), [(("--debug",), 0), ((), 0)])
def test_debug_before_the_recipe_belongs_to_vitkit(shell, tmp_path, flags, code):
    (tmp_path / "r.py").write_text("def main(run, debug: bool = False):\n    print('DEBUG', debug)")
    assert "DEBUG False" in shell(*flags, "run", *flags, "r.py", "--dry-run").stdout
    assert "DEBUG True" in shell(*flags, "run", "r.py", "--dry-run", "--debug").stdout
