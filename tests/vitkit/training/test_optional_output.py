"""A report or a tracker that fails costs a line, never the model, the summary or the tables."""

import json

import pytest
from torch import nn, optim

from vitkit import Run, datasets, heads


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = heads.build("linear", in_dim=64, out_dim=10)

    def forward(self, batch):
        return {"loss": nn.functional.cross_entropy(self.head(batch["images"].flatten(1)), batch["labels"])}


def train(out, **settings):
    data = datasets.build("digits")
    run, model = Run(out, device="cpu", compile="off", **settings), Model()
    batches = data.train.stratified_subset(40).batches(20)
    for epoch in run.fit(model, batches, epochs=2, optimizer=optim.SGD(model.parameters(), lr=0.1)):
        epoch.log(top1=0.5)
    run.save(classifier=model.head)
    run.finish()


def assert_complete(out):
    assert json.loads((out / "summary.json").read_text())["status"] == "finished"
    assert (out / "model.safetensors").exists()
    assert (out / "losses.csv").read_text().count("\n") == 3
    assert (out / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("error", [ImportError("no matplotlib"), ValueError("bad font")])
def test_a_report_that_fails_leaves_everything_else_in_place(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr("vitkit.report.write_report", broken)
    train(tmp_path / "run")
    assert_complete(tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert [line for line in log.splitlines() if "the report" in line and f"{type(error).__name__}: {error}" in line]


def test_a_tracker_that_fails_leaves_everything_else_in_place(tmp_path, monkeypatch):
    calls = []

    def broken(*_, **__):
        calls.append(1)
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", broken)
    monkeypatch.setattr("vitkit.report.write_report", lambda *_: None)
    train(tmp_path / "run", report_to="csv,tensorboard")
    assert_complete(tmp_path / "run")
    assert len(calls) == 1
    assert (tmp_path / "run" / "log.txt").read_text().count("ConnectionError: no route to the tracker") == 1
