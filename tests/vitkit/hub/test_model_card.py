"""The model card: what it says of a run, and that the Hub's own parser reads it."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from vitkit.hub import client
from vitkit.hub.model_card import is_unedited, sealed, write_card


def card_of(run, **summary):
    path = run / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **summary}))
    return client.plan(run, "me/tiny").card


def dataset(run, **changed):
    return {**json.loads((run / "summary.json").read_text())["dataset"], **changed}


def test_the_front_matter_is_what_the_hub_reads(model_run):
    card = ModelCard(card_of(model_run, dataset=dataset(model_run, hub_id="ylecun/mnist")))
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("vitkit", "apache-2.0", "image-feature-extraction")
    assert data.datasets == ["ylecun/mnist"]
    assert data.metrics == ["accuracy"]
    assert data.tags == ["vitkit", "representation-learning", "jepa_mnist", "vit", "mlp"]
    results = {result.metric_name: result for result in data.eval_results}
    final = json.loads((model_run / "summary.json").read_text())["final"]
    assert set(results) == {"linear top-1", "M1 top-1", "M1 top-3"}  # the loss is no result
    linear = results["linear top-1"]
    assert linear.metric_value == pytest.approx(final["linear_top1"], abs=1e-6)
    assert (linear.dataset_type, linear.dataset_name, linear.dataset_split) == ("ylecun/mnist", "mnist", "test")
    assert linear.metric_args == {
        "samples": 10_000, "chance": 0.1, "frozen": "encoder", "note": "on every pixel", "kind": "proportion", "direction": "max",
    }  # fmt: skip
    assert ModelCard(client.plan(model_run, "me/tiny", licence="mit").card).data.license == "mit"


def test_a_dataset_that_the_hub_does_not_have_is_not_linked(model_run):
    data = ModelCard(card_of(model_run)).data
    assert data.datasets is None
    assert {result.dataset_type for result in data.eval_results} == {"mnist"}


def test_what_a_visitor_reads(model_run):
    card = card_of(model_run, command="vitkit run /home/me/recipes/jepa_mnist.py --seed 0", machine="x86_64, 2 cores")
    for line in (
        "# tiny\n",
        "A tiny model of digits.\n\nIt is here to be published.\n",  # the recipe's docstring
        "backbone `vit`, projector `mlp`; 2,745,856 parameters.",
        "2 classes: a, b.\n",
        'import vitkit\n\nmodel = vitkit.load("me/tiny")\nfeatures = model.encode_image(model.preprocess(images))',
        "uint8 of shape (n, 1, h, w); they are resized to 8×8 pixels",
        "Loading runs no code from this repository",
        "| metric | value | chance | paper | how it was measured |",
        "| 0.1 | 0.95 | frozen encoder; 10,000 test samples; on every pixel |",
        "| dataset | mnist (60,000 train + 10,000 test images) |",
        "For reference, not measured here: paper.",
        "| command | `vitkit run recipe.py --seed 0` |",
        "| seed | 0 |",
        "| hardware | x86_64, 2 cores, device cpu, precision bf16 |",
        "| time | 6 min 45 s, 3,000 images/s in training |",
        "![M1 confusion](plots/m1_confusion.png)",
        "- The numbers are from one run with one seed",
        "Licence of the data: CC BY-SA 3.0.",
    ):
        assert line in card, line
    assert "WARNING" not in card
    assert "/home/me" not in card


def test_a_stand_in_dataset_is_said_before_anything_else(model_run):
    stood_in = dataset(model_run, name="digits", fallback_for="mnist", notice="training on digits instead")
    card = card_of(model_run, dataset=stood_in)
    heading, first = card.index("# tiny"), card.index("> **This is not a model of mnist.**")
    assert first - heading < 40
    assert "the model was trained on **digits** instead, and every number below is for digits." in card
    assert "For reference, not measured here: paper, of mnist and not to be compared with the others." in card
    assert {result.dataset_name for result in ModelCard(card).data.eval_results} == {"digits"}


def test_a_run_that_did_not_end_says_so(model_run):
    assert "> **Its training did not finish** (status: interrupted)." in card_of(model_run, status="interrupted")


def test_a_run_without_results_has_a_card_too(model_run):
    (model_run / "metrics.csv").unlink()
    (model_run / "recipe.py").write_text("not python (")
    (model_run / "summary.json").write_text(json.dumps({"status": "finished"}))
    card = ModelCard(client.plan(model_run, "me/tiny").card)
    assert card.data.eval_results is None
    assert "## Results" not in card.text
    assert "## How it was trained" not in card.text


def test_a_bar_in_a_note_does_not_break_the_table(model_run):
    protocols = {"linear_top1": {"split": "test", "note": "a | b\nc"}}
    row = next(line for line in card_of(model_run, protocols=protocols).splitlines() if line.startswith("| linear top-1"))
    assert row.endswith(r"| a \| b c |")


@pytest.mark.parametrize(
    ("modules", "task"),
    [
        (["backbone", "projector"], "image-feature-extraction"),
        (["backbone", "classifier"], "image-classification"),
        (["backbone", "decoder"], "unconditional-image-generation"),
        (["backbone", "text", "projector"], "zero-shot-image-classification"),
        (["projector"], None),
    ],
)
def test_the_task_follows_from_what_was_saved(model_run, modules, task):
    spec = {"kind": "head", "name": "x", "distribution": "vitkit", "version": "1"}
    config = {"modules": dict.fromkeys(modules, spec), "preprocessing": {}}
    card = write_card(model_run, "me/tiny", config, [], "mit")
    assert ModelCard(card).data.pipeline_tag == task
    assert ("encode_image" in card) == ("backbone" in modules)


def test_names_of_other_people_are_text_and_never_markup(model_run):
    evil = "<img src=x onerror=alert(1)>|[click](javascript:x)`"
    run = dataset(model_run, name=evil, source=evil)
    card = card_of(model_run, dataset=run, arguments={"name": evil}, command=f"vitkit run x.py --name {evil!r}", machine=evil)
    body = card.split("\n---\n", 1)[1]
    outside_code = re.sub(r"(`+).+?\1(?!`)", "", body.replace("\\`", ""))
    assert "<img" not in outside_code
    assert "[click]" not in outside_code.replace("\\[click\\]", "")
    table = [line for line in body.splitlines() if line.startswith("| dataset |")]
    assert len(re.findall(r"(?<!\\)\|", table[0])) == 3
    assert ModelCard(card).data.eval_results[0].dataset_name == evil


def test_a_seal_stands_until_somebody_edits():
    card = sealed("---\na: 1\n---\n\n# Title\n\nText.\n")
    assert is_unedited(card)
    assert is_unedited(card.replace("\n", "\r\n"))
    assert is_unedited(card + "\n")
    for edited in (card.replace("Text", "Test"), card.replace("a: 1", "a: 2"), card + "More.\n", "# Mine\n", ""):
        assert not is_unedited(edited)
