"""`vitkit embed`, `predict`, `eval` and `export` as a person types them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vitkit import backbones, heads
from vitkit.models.saving import save

PREPARE = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "fit": "resize"}


@pytest.fixture
def vitkit(tmp_path, shell):
    """`vitkit("predict", ...)` in a directory that holds pictures/, and a model `classifier` and one of `features` alone."""
    torch.manual_seed(0)
    backbone = backbones.build("vit", img_size=8, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    modules = {"backbone": backbone, "classifier": heads.build("linear", in_dim=8, out_dim=10)}
    written = {"preprocessing": PREPARE, "classes": [f"[{digit}]" for digit in range(10)], "arguments": {}}
    save(tmp_path / "classifier", modules, **written)
    save(tmp_path / "features", {"backbone": backbone}, **written)
    random = np.random.default_rng(0)
    for index in range(3):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9, 9), dtype=np.uint8)).save(tmp_path / "pictures" / f"{index}.png")
    return shell


def test_embed_writes_a_file_and_names_what_it_left_out(vitkit, tmp_path):
    (tmp_path / "pictures" / "1.png").write_bytes(b"")
    done = vitkit("embed", "features", "pictures", "-o", "out.safetensors", "--batch-size", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out.safetensors: features of 2 images, 8 numbers each\n"
    assert "left out: pictures/1.png: UnidentifiedImageError" in done.stderr
    assert load_file(tmp_path / "out.safetensors")["features"].shape == (2, 8)
    again = vitkit("embed", "features", "pictures", "-o", "out.safetensors")
    assert again.returncode == 2
    assert "give --overwrite" in again.stderr


def test_predict_prints_a_table_or_json(vitkit):
    answer = vitkit("predict", "classifier", "pictures/0.png", "pictures/1.png", "--top", "2")
    assert answer.returncode == 0, answer.stderr
    assert "pictures/1.png" in answer.stdout
    assert "in brackets: probability" in answer.stdout
    rows = json.loads(vitkit("predict", "classifier", "pictures", "--json").stdout)
    assert [row["image"] for row in rows] == [f"pictures/{index}.png" for index in range(3)]
    assert sorted(rows[0]["labels"]) == [f"[{digit}]" for digit in range(10)]
    assert sum(rows[0]["scores"]) == pytest.approx(1.0, abs=1e-5)
    assert rows[0]["measure"] == "probability"
    assert f"{rows[0]['labels'][0]} ({rows[0]['scores'][0]:.3f})" in answer.stdout


def test_predict_goes_on_past_a_picture_that_cannot_be_read(vitkit, tmp_path):
    (tmp_path / "pictures" / "0.png").write_bytes(b"")
    done = vitkit("predict", "classifier", "pictures", "--json")
    assert done.returncode == 1
    rows = json.loads(done.stdout)
    assert rows[0]["error"].startswith("UnidentifiedImageError")
    assert "labels" in rows[1]
    only = vitkit("predict", "classifier", "pictures/0.png")
    assert (only.returncode, only.stdout) == (1, "")
    assert "left out: pictures/0.png: UnidentifiedImageError" in only.stderr


def test_eval_prints_values_with_their_protocol_and_writes_them(vitkit, tmp_path):
    done = vitkit(
        "eval", "features", "--dataset", "digits", "--evaluator", "knn", "--evaluator", "linear_probe",
        "--arg", "train_size=200", "--arg", "knn.k=3", "-o", "scores.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 nearest of 200 training images" in done.stdout
    written = json.loads((tmp_path / "scores.json").read_text())
    assert set(written["scores"]) == {"knn_top1", "linear_top1"}
    for row in written["scores"].values():
        assert (row["chance"], row["samples"], row["split"]) == (0.1, 382, "test")
        assert f"{row['value']:.4f}" in done.stdout
    assert written["evaluators"]["knn"]["kwargs"] == {"train_size": 200, "k": 3}
    assert written["evaluators"]["linear_probe"]["kwargs"] == {"train_size": 200}
    command = ("eval", "features", "--dataset", "digits", "--evaluator", "knn", "-o", "scores.json")
    refused = vitkit(*command)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "-o scores.json exists already; choose another name, or give --overwrite" in refused.stderr
    assert vitkit(*command, "--overwrite").returncode == 0
    assert set(json.loads((tmp_path / "scores.json").read_text())["scores"]) == {"knn_top1"}


def test_eval_measures_on_the_split_that_is_asked_for(vitkit, tmp_path):
    done = vitkit("eval", "features", "--dataset", "digits", "--evaluator", "knn", "--split", "val", "-o", "val.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "val.json").read_text())
    assert {name: row["split"] for name, row in written["scores"].items()} == {"val_knn_top1": "val"}


def test_eval_without_a_name_asks_every_evaluator_and_says_which_do_not_suit(vitkit, install, monkeypatch):
    from vitkit.registry import evaluators

    install("broken-one", "0.1", {"evaluators": {"x": "broken_one:X"}}, broken_one="import no_such_module")
    monkeypatch.setattr(evaluators, "names", lambda: ["knn", "label_retrieval", "x"])
    done = vitkit("eval", "features", "--dataset", "digits")
    assert done.returncode == 0, done.stderr
    assert "knn_top1" in done.stdout
    assert "label_retrieval does not suit: label retrieval needs a model whose .backbone takes labels" in done.stderr
    assert "x is left out: evaluator 'x' of broken-one 0.1" in done.stderr


def test_export_says_what_goes_in_and_comes_out(vitkit, tmp_path):
    done = vitkit("export", "classifier", "--format", "torch-export")
    assert done.returncode == 0, done.stderr
    assert "classifier/model.pt2: images float32 (n, 1, 8, 8) in [0, 1] → features (n, 8), probabilities (n, 10)" in done.stdout
    assert (tmp_path / "classifier" / "model.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["predict", "features", "pictures"], "this model has backbone (vit)"),
        (["predict", "classifier", "digits"], "'digits' is a dataset; predict takes image files"),
        (["predict", "classifier", ""], "an argument for the images is empty, perhaps an unset variable"),
        (["predict", "", "pictures"], "MODEL is empty; give a directory that a run saved into, or a Hub repository OWNER/NAME"),
        (["predict", "https://huggingface.co/a/b", "pictures"], "MODEL is the address https://huggingface.co/a/b; give a repository"),
        (["predict", "classifier", "https://example.com/x.png"], "https://example.com/x.png is an address; download the image"),
        (["predict", "classifier", "pictures", "--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        (["predict", "classifier", "pictures", "--top", "0"], "--top is 0; expected at least 1"),
        (["eval", "features", "--dataset", "pictures"], "pictures is a folder; import it with `vitkit data import pictures --name mine`"),
        (["eval", "features", "--dataset", ""], "no dataset named ''"),
        (["eval", "features", "--dataset", "digits", "-o", "pictures"], "-o pictures is a directory; expected the name of a JSON file"),
        (["eval", "features", "--dataset", "digits", "-o", "features/config.json"], "exists already; choose another name, or give"),
        (
            ["eval", "features", "--dataset", "digits", "-o", "features/config.json", "--overwrite"],
            "-o features/config.json exists and is not a JSON file of scores, so it is not replaced",
        ),
        (
            ["embed", "features", "pictures", "-o", "features/model.safetensors", "--overwrite"],
            "-o features/model.safetensors exists and is not a .safetensors file of features, so it is not replaced",
        ),
        (["predict", "nowhere", "pictures"], "no model at nowhere"),
        (["predict", "classifier", "nothing.png"], "no image at nothing.png"),
        (["eval", "features", "--dataset", "digts"], "did you mean 'digits'?"),
        (["eval", "features", "--dataset", "digits", "--evaluator", "knm"], "did you mean 'knn'?"),
        (["eval", "features", "--dataset", "digits", "--evaluator", "knn", "--arg", "k"], "an argument is NAME=VALUE"),
        (["eval", "features", "--dataset", "digits", "--evaluator", "knn", "--arg", "x.k=1"], "the evaluator 'x' is not selected"),
        (["eval", "features", "--dataset", "digits", "--evaluator", "knn", "--arg", "k=a"], "k is 'a', expected int"),
        (["eval", "features", "--dataset", "digits", "--evaluator", "knn", "--arg", "kk=1"], "takes no argument 'kk'"),
        (["eval", "features", "--dataset", "digits", "--evaluator", "label_retrieval"], "label retrieval needs a model"),
        (["export", "nowhere"], "no model at nowhere: no such directory"),
        (["export", "someone/model"], "someone/model is no local directory, so the output has no default path; give -o FILE"),
        (["export", "features", "-o", "x.h5"], "cannot export to x.h5"),
        (["embed", "features", "digits", "-o", "x.npy"], "expected the name of a .safetensors file"),
    ],
)
def test_bad_input_is_answered_with_one_message(vitkit, arguments, text):
    answer = vitkit(*arguments)
    assert answer.returncode in (1, 2)
    assert text in answer.stderr
    assert "Traceback" not in answer.stderr
    assert "vitkit did not expect this error" not in answer.stderr
