"""A report or a tracker that fails costs a line, never the model, the summary or the tables."""

import json

import pytest
import torch
from torch import nn, optim

from vitkit import Run, heads


def batches():
    return [{"images": torch.randn(4, 3), "labels": torch.zeros(4)} for _ in range(2)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = heads.build("linear", in_dim=3, out_dim=1)

    def forward(self, batch):
        return {"loss": self.head(batch["images"]).square().mean()}


def train(out, **settings):
    run, model = Run(out, device="cpu", compile="off", **settings), Model()
    for epoch in run.fit(model, batches(), epochs=2, optimizer=optim.SGD(model.parameters(), lr=0.1)):
        epoch.log(top1=0.5)
    run._preprocessing = {"shape": [1, 1, 3], "mean": [0.0], "std": [1.0]}
    run.save(classifier=model.head)
    run.finish()


def assert_complete(out):
    assert json.loads((out / "summary.json").read_text())["status"] == "finished"
    assert (out / "model.safetensors").exists()
    assert (out / "losses.csv").read_text().count("\n") == 3
    assert (out / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("error", [ImportError("no matplotlib"), ValueError("bad\x1b[2J font")])
def test_a_report_that_fails_leaves_everything_else_in_place(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr("vitkit.report.write_report", broken)
    train(tmp_path / "run")
    assert_complete(tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"the report could not be written: {type(error).__name__}: " in log
    assert "\x1b" not in log
    assert "report: " not in log


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
    text = "the trackers failed, and the run continues without them: ConnectionError: no route to the tracker"
    assert (tmp_path / "run" / "log.txt").read_text().count(text) == 1
