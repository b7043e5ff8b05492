"""The report: complete, self-contained, honest about its data, and unbreakable by what runs hold."""

import base64
import html.parser
import io
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from vitkit.contracts import Attention, Confusion, Embeddings
from vitkit.errors import RunError, UsageError
from vitkit.report import curves, write_report
from vitkit.report.figures import MAX_POINTS, _sample, confusion, draw_figure, embeddings, plane
from vitkit.report.formatting import (
    format_constant,
    format_difference,
    format_number,
    split_topk,
    title_of,
)
from vitkit.report.page import page
from vitkit.report.record import read_record
from vitkit.report.style import class_labels, drawable, house_style, png

ODD = [
    "<script>alert(1)</script>",
    "猫",
    "$a_b$ & $",
    "_hidden",
    "ein sehr langer Name, der nie ein Ende findet",
    "кошка",
    "x\ny",
]
VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """A page's tags, texts and attributes; fails on a tag that is closed wrongly."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.attributes if name == tag]


def test_a_page_holds_all_that_the_run_left_behind(make_run):
    directory = make_run()
    matrix = np.eye(10, dtype=int) * 9
    matrix[3, 5] = 4
    path = write_report(directory, {"m1_confusion": Confusion(matrix, [str(digit) for digit in range(10)])})
    assert path == directory / "report.html"
    parsed = Page(path)
    names = {"losses", "pace", "metrics", "accuracies", "m1_confusion"}
    assert {file.stem for file in (directory / "plots").iterdir()} == names
    pictures = parsed.all("img")
    assert len(pictures) == len(names)
    for picture in pictures:
        assert len(picture["alt"]) > 20
        Image.open(io.BytesIO(base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")))).verify()
    for text in (
        "jepa_mnist", "finished", "data: mnist", "0.9551", "paper 0.95 (+0.0051)", "chance 0.1", "± 0.0021",
        "frozen: encoder; test split; 10,000 samples; on every pixel", "60,000", "CC BY-SA 3.0", "6 min 45 s",
        "2,745,856 parameters", "vitkit run recipes/jepa_mnist.py --seed 0", "3.11.7", "label_fraction", "none",
        "90 of 94 right (95.74%). Most frequent mistakes: “3” taken for “5” (4).",
    ):  # fmt: skip
        assert text in parsed.text, text
    assert "instead" not in parsed.text


def test_a_page_needs_nothing_but_itself(make_run):
    path = write_report(make_run())
    parsed, text = Page(path), path.read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "a"} & set(parsed.tags)
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert path.stat().st_size < 3_000_000
    assert parsed.all("html") == [{"lang": "en"}]
    assert parsed.tags.count("table") == parsed.tags.count("caption") > 3
    assert all(cell.get("scope") in ("row", "col") for cell in parsed.all("th"))


def test_a_fallback_is_announced_above_all_and_its_results_are_not_held_against_the_references(make_run):
    notice = "mnist could not be downloaded: this run uses digits"
    data = {"name": "digits", "asked": "auto", "fallback_for": "mnist", "notice": notice, "classes": ["0", "1"]}
    path = make_run(dataset=data) / "report.html"
    path.write_text(page(read_record(path.parent), [], [], []))
    parsed = Page(path)
    banner = parsed.text.index("This is not mnist: the run used digits instead")
    assert banner < parsed.text.index(notice) < parsed.text.index("Results")
    assert "digits (instead of mnist)" in parsed.text
    assert "paper 0.95" in parsed.text
    assert "(+0.0051)" not in parsed.text


@pytest.mark.parametrize(
    ("status", "text"),
    [("interrupted", "stopped before its end"), ("failed", "This run failed"), ("running", "This run stopped without an ending")],
)
def test_an_unfinished_run_says_so(make_run, status, text):
    assert text in page(read_record(make_run(status=status)), [], [], [])


def test_a_run_whose_process_lives_has_not_ended_and_one_that_was_killed_says_how_to_resume_it(make_run):
    directory = make_run("it's here", status="running")
    with FileLock(directory / ".lock"):
        text = page(read_record(directory), [], [], [])
    assert "This run has not ended" in text
    assert "Resume it" not in text
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints" / "last.safetensors").touch()
    path = directory / "report.html"
    path.write_text(page(read_record(directory), [], [], []))
    assert shlex.join(["vitkit", "run", "recipes/jepa_mnist.py", "--seed", "0", "--out", str(directory), "--resume"]) in Page(path).text
    assert '<span class="chip stopped">stopped</span>' in path.read_text()


def test_the_best_is_the_validation_value_where_the_test_split_was_not_measured_then(make_run):
    metrics = [{"epoch": 1, "val_knn_top1": 0.9}, {"epoch": 2, "val_knn_top1": 0.8, "knn_top1": 0.7}]
    protocol = {"samples": 100, "kind": "proportion"}
    protocols = {"knn_top1": {"split": "test", **protocol}, "val_knn_top1": {"split": "val", **protocol}}
    best = {"val_knn_top1": {"value": 0.9, "epoch": 1}, "knn_top1": {"value": 0.7, "epoch": 2}}
    parsed = Page(write_report(make_run(metrics=metrics, protocols=protocols, best=best, references={})))
    assert "knn_top1 0.8000 0.7000 validation 0.9000 (epoch 1)" in parsed.text


def test_validation_and_test_stand_side_by_side_and_say_which_is_which(make_run):
    metrics = [
        {"epoch": e, "val_knn_top1": v, "knn_top1": t, "psnr": 20.0 + e} for e, v, t in ((1, 0.9, 0.81), (2, 0.95, 0.82), (3, 0.93, 0.83))
    ]
    protocols = {
        "knn_top1": {"split": "test", "samples": 400, "kind": "proportion", "chance": 0.1, "untrained": 0.296},
        "val_knn_top1": {"split": "val", "samples": 100, "kind": "proportion", "chance": 0.1},
        "psnr": {"split": "test", "samples": 400, "unit": "dB"},
    }
    best = {"val_knn_top1": {"value": 0.95, "epoch": 2}, "knn_top1": {"value": 0.83, "epoch": 3}, "psnr": {"value": 23.0, "epoch": 3}}
    directory = make_run(metrics=metrics, protocols=protocols, best=best, references={})
    parsed = Page(write_report(directory))
    assert "metric validation test best chance untrained how it was measured" in parsed.text
    assert "knn_top1 0.9300 0.8300 0.8200 (epoch 2) 0.1 0.296 test split; 400 samples; validation split: 100" in parsed.text
    assert "psnr – 23.00 dB 23.00 (epoch 3) – – test split; 400 samples" in parsed.text
    assert "knn top-1 test 0.8300 ± 0.0188 validation 0.9300 chance 0.1 untrained 0.296" in parsed.text  # the card
    assert "Validation values may choose an epoch or a setting; test values are the result, and chose nothing." in parsed.text
    with house_style():
        plot = curves.metrics(read_record(directory))
    titles = [axis.get_title(loc="left") for axis in plot.figure.axes]
    assert titles == ["knn", "psnr (dB)"]
    legend = [text.get_text() for text in plot.figure.axes[0].get_legend().get_texts()]
    assert legend == ["top-1 validation 0.9300", "top-1 test 0.8300", "chance 0.1", "untrained 0.296"]
    assert plot.figure.axes[0].get_ylim() == (-0.02, 1.04)


def test_lower_is_better_only_where_the_protocol_says_so(make_run):
    protocols = {"cost": {"direction": "min"}, "mse": {}}
    final, references = {"cost": 0.2, "mse": 0.2}, {"paper": {"cost": 0.3, "mse": 0.3}}
    directory = make_run(metrics=[], final=final, protocols=protocols, references=references)
    text = page(read_record(directory), [], [], [])
    assert re.findall(r'<span class="(better|worse)">', text) == ["better", "worse"]
    assert text.count('title="lower is better"') == 1


@pytest.mark.parametrize(("last", "stuck"), [(2.31, True), (2.26, True), (2.0, False), (2.5, False)])
def test_a_loss_at_its_uninformed_value_is_announced(make_run, last, stuck):
    losses = [{"epoch": 1, "loss": 2.4, "lr": 1e-3}, {"epoch": 2, "loss": last, "lr": 1e-3}]
    directory = make_run(losses=losses, metrics=[], references={"uninformed": {"loss": 2.3026}})
    path = write_report(directory)
    parsed = Page(path)
    assert ("The loss is that of an uninformed prediction" in parsed.text) == stuck
    assert (f"loss {last:.4f}, uninformed 2.3026." in parsed.text) == stuck
    assert "Its uninformed line is at 2.3026." in parsed.all("img")[0]["alt"]
    assert "uninformed: the value of a prediction that uses no information about its input." in parsed.text


def test_bounds_of_a_loss_are_drawn_inside_its_panel(make_run):
    directory = make_run(references={"floor": {"sigreg": 1.0525}, "uninformed": {"sigreg": 102.9, "loss": 3.0}})
    with house_style():
        plot = curves.losses(read_record(directory))
    panels = {axis.get_title(loc="left"): axis for axis in plot.figure.axes}
    assert [text.get_text() for text in panels["sigreg"].texts] == ["floor 1.0525", "uninformed 102.9"]
    low, high = panels["sigreg"].get_ylim()
    assert low < 1.0525 < 102.9 < high
    assert panels["sigreg"].get_yscale() == "log"
    assert [text.get_text() for text in panels["loss"].texts] == ["uninformed 3"]
    assert not panels["invariance"].texts


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no_such_backend"])
def test_the_backend_of_a_notebook_does_not_decide(make_run, backend):
    directory = make_run()
    program = (
        "import os, sys; from vitkit.report import write_report; write_report(sys.argv[1]);"
        "print(os.environ['MPLBACKEND'], 'matplotlib.pyplot' in sys.modules)"
    )
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", program, str(directory)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{backend} False\n"
    assert "could not be drawn" not in (directory / "report.html").read_text()
    assert len(list((directory / "plots").iterdir())) == 4


def test_a_curve_that_cannot_be_drawn_costs_only_itself(make_run, monkeypatch):
    directory = make_run()

    def broken(_):
        raise RuntimeError("no font")

    monkeypatch.setattr("vitkit.report.curves.losses", broken)
    parsed = Page(write_report(directory))
    assert "Some figures could not be drawn losses: no font" in parsed.text
    assert len(parsed.all("img")) == 3


def test_missing_files_and_columns_leave_their_part_out(tmp_path, make_run):
    empty = tmp_path / "empty"
    empty.mkdir()
    parsed = Page(write_report(empty))
    assert parsed.text.startswith("empty · vitkit empty unknown")
    assert "img" not in parsed.tags
    (empty / "losses.csv").write_text("loss\n2.0\n1.0\n")
    parsed = Page(write_report(empty))
    assert parsed.all("img")[0]["alt"] == "loss: from 2.0000 at epoch 1 to 1.0000 at epoch 2."
    (empty / "losses.csv").write_bytes(b"loss\n\xff\xfe\n")
    with pytest.raises(UsageError, match="cannot read .*losses.csv.*expected the table that a run writes"):
        write_report(empty)
    bare = make_run("bare", protocols={}, references={}, best={}, dataset={}, versions={}, command="", settings=None)
    text = page(read_record(bare), [], [], [])
    assert "not recorded" in text
    assert "chance 0" not in text


def test_a_single_epoch_blanks_and_values_that_are_not_finite(make_run):
    losses = [{"epoch": 1, "loss": 0.5, "gone": float("nan"), "part": float("inf")}]
    metrics = [{"epoch": 1, "m1_top1": 0.4, "m1_top3": float("nan")}]
    directory = make_run(losses=losses, metrics=metrics, final={"m1_top1": 0.4, "m1_top3": None})
    parsed = Page(write_report(directory))
    assert [picture["alt"] for picture in parsed.all("img")] == [
        "loss: 0.5000 at epoch 1.",
        "M1 top-1: 0.4000 at epoch 1.",
        "Final accuracies: M1 top-1 0.4000.",
    ]
    series = read_record(make_run("blank", metrics=[{"epoch": 1, "a": 1.0}, {"epoch": 2, "b": 2.0}])).metrics
    assert series["a"].epochs.tolist() == [1.0]
    assert series["b"].epochs.tolist() == [2.0]


def test_an_error_below_one_is_drawn_on_its_own_scale(make_run):
    metrics = [{"epoch": e, "knn_top1": 0.5 + e / 10, "reconstruction_mse": 0.05 - e / 100} for e in (1, 2, 3)]
    protocols = {
        "knn_top1": {"kind": "proportion", "chance": 0.1},
        "reconstruction_mse": {"kind": "error", "direction": "min", "chance": 0.1},
    }
    with house_style():
        plot = curves.metrics(read_record(make_run(metrics=metrics, protocols=protocols)))
    limits = {axis.get_title(loc="left"): axis.get_ylim() for axis in plot.figure.axes}
    assert limits["knn"] == (-0.02, 1.04)
    assert limits["reconstruction mse"][1] < 0.2  # the chance level is 0.1


def test_odd_class_names_are_escaped_on_the_page_and_drawn_or_numbered_in_pictures(make_run):
    data = {"name": "<u>mine</u>", "classes": ODD}
    pictures = {
        "../<b>confusion": Confusion(np.ones((7, 7)), ODD),
        "map": Embeddings(np.random.default_rng(0).normal(size=(20, 5)), np.arange(20) % 8, ODD),
    }
    directory = make_run("odd", recipe="<b>odd</b>", dataset=data, metrics=[{"epoch": 1, "_$x$_top1": 0.3}])
    path = write_report(directory, pictures)
    parsed = Page(path)
    assert "script" not in parsed.tags
    assert "u" not in parsed.tags
    assert "<u>mine</u>" in parsed.text
    assert "<script>" not in path.read_text(encoding="utf-8")
    assert "<b>odd</b>" in parsed.text
    assert "<script>alert(1)</script>, 猫, $a_b$ & $" in parsed.text.replace(" ,", ",")
    assert "could not be drawn" not in parsed.text
    assert (directory / "plots" / "b_confusion.png").exists()
    assert class_labels(ODD) == [
        "<script>alert…cript>", "#1", r"\$a_b\$ & \$", "\u200a_hidden", "ein sehr lang…findet", "кошка", "x y",
    ]  # fmt: skip
    assert drawable("a" * 50 + "z", 10) == "aaaaaa…aaz"


def test_a_picture_that_cannot_be_drawn_costs_only_itself(make_run):
    pictures = {
        "first": Confusion(np.ones((2, 3)), ["a", "b"]),
        "second": Embeddings(np.ones((3, 2)), np.ones(2), ["a"]),
        "third": Attention(np.ones((1, 1, 4, 4)), np.ones((1, 4, 4)), []),
        "fourth": "no picture",
        "good": Confusion(np.ones((1, 1)), ["only"]),
    }
    directory = make_run(losses=[], metrics=[])
    parsed = Page(write_report(directory, pictures))
    assert "Some figures could not be drawn" in parsed.text
    for text in (
        "first: a confusion matrix has shape (k, k) for k class names; got (2, 3) and 2 names",
        "second: features are (n, d) and labels (n,); got (3, 2) and (2,)",
        "third: images are (n, c, h, w), maps (n, h, w) and captions n texts; got (1, 1, 4, 4), (1, 4, 4) and 0",
        "fourth: a Confusion, Embeddings, Attention, Sheet or Proportions was expected, not str",
        "1 of 1 right",
    ):
        assert text in parsed.text
    assert (directory / "plots" / "good.png").exists()
    assert not (directory / "plots" / "first.png").exists()


def test_nothing_is_left_half_written(make_run, monkeypatch):
    directory = make_run(losses=[{"epoch": 1, "loss": 1.0}], metrics=[])
    write_report(directory)
    before = (directory / "report.html").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="cannot write .*losses.png: No space left on device; free some room"):
        write_report(directory)
    assert (directory / "report.html").read_bytes() == before
    assert not list(directory.rglob("*.partial"))


def test_a_report_leaves_no_matplotlib_settings_behind():
    import matplotlib

    with matplotlib.rc_context({"font.size": 33.0, "text.usetex": True}):
        with house_style():
            assert matplotlib.rcParams["font.size"] == 9.0
            assert not matplotlib.rcParams["text.usetex"]
        assert matplotlib.rcParams["font.size"] == 33.0


@pytest.mark.parametrize("k", [1, 10, 100, 300])
def test_a_confusion_matrix_names_as_many_classes_as_can_be_read(k):
    names = [f"class {place}" for place in range(k)]
    with house_style():
        plot = confusion("m", Confusion(torch.eye(k), names))
    axis = plot.figure.axes[0]
    ticks = [label.get_text() for label in axis.get_yticklabels()]
    assert ticks == names[:: -(-k // 100)]
    assert len(axis.texts) == (k if k <= 20 else 0)
    assert f"{k} of {k} right (100.00%)." in plot.caption
    assert plot.wide == (k > 20)


def test_points_of_an_embedding_are_the_same_each_time_and_keep_neighbours_together():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)
    features = 6 * generator.normal(size=(4, 16))[labels] + generator.normal(size=(120, 16))
    points, how = plane(features)
    assert how == "PCA to 16 dimensions, then t-SNE"
    np.testing.assert_array_equal(points, plane(features)[0])
    distances = ((points[:, None] - points[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() > 0.99


@pytest.mark.parametrize(
    ("features", "how"),
    [
        (np.ones((50, 8)), "all at one point"),
        (np.zeros((0, 8)), "all at one point"),
        (np.random.default_rng(0).normal(size=(50, 2)), "their first two principal components"),
        (np.random.default_rng(0).normal(size=(5, 8)), "their first two principal components"),
        (np.random.default_rng(0).normal(size=(50, 1)), "their first two principal components"),
        (1e30 * np.random.default_rng(0).normal(size=(50, 8)), "PCA to 8 dimensions, then t-SNE"),
        (np.repeat(np.random.default_rng(0).normal(size=(2, 8)), 25, axis=0), "their first two principal components"),
    ],
)
def test_embeddings_that_have_no_neighbourhoods_are_drawn_more_simply(features, how):
    points, method = plane(features.astype(np.float32))
    assert method == how
    assert points.shape == (len(features), 2)
    assert np.isfinite(points).all()


def test_embeddings_leave_out_what_is_not_finite_and_name_every_class():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    features[3, 2] = float("nan")
    with house_style():
        plot = embeddings("e", Embeddings(features, torch.arange(40) % 4 - 1, ["a", "b", "c"]))
    legend = [text.get_text() for text in plot.figure.legends[0].get_texts()]
    assert legend == ["class -1", "a", "b", "c"]
    assert plot.caption.startswith(
        "39 embeddings, PCA to 6 dimensions, then t-SNE. 1 that are not finite are left out."
    )


def test_a_sample_keeps_the_classes_in_proportion():
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [6000, 3000, 1000]))
    chosen = _sample(labels, MAX_POINTS)
    assert len(np.unique(chosen)) == MAX_POINTS
    np.testing.assert_allclose(np.bincount(labels[chosen]) / MAX_POINTS, [0.6, 0.3, 0.1], atol=0.002)


@pytest.mark.parametrize(("channels", "count"), [(1, 18), (2, 2), (4, 1)])
def test_attention_lies_over_every_kind_of_image(channels, count):
    images, maps = torch.rand(count, channels, 8, 12), torch.rand(count, 4, 6)
    with house_style():
        plot = draw_figure("a", Attention(images, maps, [f"label {place} $" for place in range(count)]))
        data = png(plot.figure, dpi=20)
    assert ("16 of 18 are shown" in plot.caption) == (count == 18)
    assert Image.open(io.BytesIO(data)).format == "PNG"
    assert [len(axis.images) for axis in plot.figure.axes].count(2) == min(count, 16)


def test_names_and_numbers_as_they_are_written():
    assert [title_of(name) for name in ("m1_top3", "linear_top1", "top5", "val_loss")] == [
        "M1 top-3", "linear top-1", "top-5", "loss (validation)",
    ]  # fmt: skip
    assert split_topk("m1_top3") == ("m1", 3)
    assert split_topk("stop") is None
    assert [format_number(value) for value in (0.97534, 12.345, 54321.0, 1e-5, 2e7, float("nan"), None, -0.5)] == [
        "0.9753", "12.35", "54,321", "1e-5", "2e+7", "–", "–", "-0.5000",
    ]  # fmt: skip
    assert format_number(23.456, "dB") == "23.46 dB"
    assert [format_constant(value) for value in (0.1, 1.0525, 1e-4, None)] == ["0.1", "1.0525", "0.0001", "–"]
    assert format_difference(0.5, 0.51) == "−0.0100"
    assert format_difference(float("nan"), 0.5) == ""


def test_only_proportions_have_a_standard_error(make_run):
    protocols = {"m1_top1": {"kind": "proportion", "samples": 100}, "psnr_top1": {"samples": 100}, "m2_top1": {"kind": "proportion"}}
    record = read_record(make_run(final={"m1_top1": 0.5, "psnr_top1": 0.5, "m2_top1": 0.5}, protocols=protocols))
    assert record.standard_error("m1_top1") == pytest.approx(0.05)
    assert record.standard_error("psnr_top1") is None
    assert record.standard_error("m2_top1") is None
