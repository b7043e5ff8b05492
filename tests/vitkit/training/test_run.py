"""The run that a recipe talks to: evaluating, and saving with the facts of the data that was trained on."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitkit
from vitkit import Run, Scores, backbones, heads, losses
from vitkit.contracts import Measurement
from vitkit.data import build
from vitkit.errors import UsageError
from vitkit.models import extract_features


class Classifier(nn.Module):
    def __init__(self, size=8, temperature=None):
        super().__init__()
        self.backbone = backbones.build("vit", img_size=size, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
        self.classifier = heads.build("linear", in_dim=8, out_dim=10)
        self.loss = losses.build("info_nce", temperature=0.1, learned=temperature == "learned")
        self.plain = nn.Linear(1, 1)
        self.batches = 0

    def encode_image(self, images):
        self.batches += 1
        return self.backbone(images).mean(1)

    def forward(self, batch):
        logits = self.classifier(self.encode_image(batch["images"]))
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]) + 0 * self.loss(logits, logits)["loss"]}


def fit(run, model, batches, epochs=1):
    return run.fit(model, batches, epochs=epochs, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def named(rows):
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", device="cpu", precision="fp32")
    yield run
    run.close()


def config(run):
    return json.loads((run.directory / "config.json").read_text())


@pytest.mark.parametrize(("temperature", "parts"), [(None, ["backbone", "classifier"]), ("learned", ["backbone", "classifier", "loss"])])
def test_save_finds_the_parts_that_a_registry_built_and_losses_that_learn(run, temperature, parts):
    data = build("digits").resized(8)
    model = Classifier(temperature=temperature)
    for _ in fit(run, model, data.train.stratified_subset(64).batches(32)):
        pass
    run.save(model)
    assert sorted(config(run)["modules"]) == parts
    loaded = vitkit.load(run.directory)
    saved = loaded.classifier.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.classifier.state_dict().items())


def test_save_takes_classes_and_preprocessing_from_the_data_that_was_trained_on(run):
    """However the dataset was built, and whatever other datasets the run has seen."""
    data = build("digits").resized(12)
    trained = data.train.stratified_subset(64)
    run.dataset("digits", default="digits")
    model = Classifier(size=12)
    for _ in fit(run, model, trained.mask_labels(1.0).batches(32)):
        pass
    run.save(model)
    assert config(run)["classes"] == data.classes
    assert config(run)["preprocessing"] == trained.preprocessing.to_json()


def test_save_without_facts_of_the_data_says_so_and_saves(run, capsys):
    images = TensorDataset(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    loader = DataLoader(images, batch_size=4, collate_fn=named)
    model = Classifier()
    for _ in fit(run, model, loader):
        pass
    run.save(model)
    assert "the batches name no preprocessing: the saved model takes only preprocessed images" in (run.directory / "log.txt").read_text()
    with pytest.raises(UsageError, match="this model was saved without preprocessing; normalise images as its training did"):
        vitkit.load(run.directory).preprocess(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_a_data_loader_names_the_classes_of_its_dataset(run):
    images = TensorDataset(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    images.classes = ["cat", "dog"]
    loader = DataLoader(images, batch_size=4, collate_fn=named)
    model = Classifier()
    for _ in fit(run, model, loader):
        pass
    run.save(model)
    assert config(run)["classes"] == ["cat", "dog"]


def test_a_model_without_registered_parts_is_refused(run):
    with pytest.raises(UsageError, match=r"no attribute of Linear was built by a registry; .* name the modules: run.save\(backbone=...\)"):
        run.save(nn.Linear(1, 1))


def test_evaluate_shares_features_uses_the_runs_precision_and_logs(tmp_path):
    run = Run(tmp_path / "run", device="cpu", precision="bf16")
    data = build("digits").resized(8)
    model, dtypes = Classifier(), []

    class Measure:
        def __init__(self, name):
            self.name = name

        def __call__(self, model, dataset, split="test"):
            extract_features(model, dataset.test)
            dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            scores = Scores({self.name: len(getattr(dataset, split, dataset.test))}, protocols={self.name: Measurement(split, 1)})
            return scores.prefixed("val_") if split == "val" else scores

    for epoch in fit(run, model, data.train.stratified_subset(64).batches(32)):
        model.batches = 0
        scores = epoch.evaluate(model, data, Measure("one"), Measure("two"))
        assert model.batches == 1
        validation = epoch.evaluate(model, SimpleNamespace(test=data.test, val=data.train), Measure("one"), split="val")
    run.close()
    assert dtypes == [torch.bfloat16] * 3
    assert scores == {"one": 382.0, "two": 382.0}
    assert validation == {"val_one": float(len(data.train))}
    assert validation.protocols["val_one"].split == "val"
    assert epoch.logged == {**scores, **validation}


class Refusing:
    """An evaluator whose conditions the data does not meet."""

    def check(self, dataset, split="test"):
        raise UsageError("10 shots need ten images of each class")

    def __call__(self, model, dataset, split="test"):
        raise UsageError("10 shots need ten images of each class")


def small():
    return build("digits").resized(8).train.stratified_subset(64).batches(32)


def test_an_evaluator_whose_conditions_are_not_met_is_left_out_with_a_line(run):
    model, data = Classifier(), build("digits").resized(8)
    assert run.check(data, Refusing(), len) == [len]
    for epoch in fit(run, model, small()):
        scores = epoch.evaluate(model, data, Refusing(), lambda model, data: Scores({"one": 1.0}))
        assert scores == {"one": 1.0}
        assert epoch.evaluate(model, data, Refusing()) == {}
    run.save(model)
    run.finish()
    log = (run.directory / "log.txt").read_text()
    assert log.count("the evaluator Refusing is left out: 10 shots need ten images of each class") == 3
    assert json.loads((run.directory / "summary.json").read_text())["status"] == "finished"


class WeightNorm:
    """The norm of the classifier's weights, on either split."""

    def __call__(self, model, dataset, split="test"):
        scores = Scores({"norm": float(model.classifier.linear.weight.detach().norm())}, protocols={"norm": Measurement(split, 1)})
        return scores.prefixed("val_") if split == "val" else scores


def test_metrics_stand_beside_their_value_for_the_untrained_network(run):
    model, data, weight_norm = Classifier(), build("digits").resized(8), WeightNorm()
    before = float(model.classifier.linear.weight.detach().norm())
    run.measure_untrained(model, data, weight_norm, Refusing())
    assert not (run.directory / "summary.json").exists()
    for epoch in fit(run, model, small()):
        epoch.evaluate(model, data, weight_norm)
        epoch.evaluate(model, data, weight_norm, split="val")
        with pytest.raises(UsageError, match=r"measure_untrained comes after run\.fit, which trains the model; call it before run\.fit"):
            run.measure_untrained(model, data, weight_norm)
    run.finish()
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["protocols"]["norm"]["untrained"] == before != summary["final"]["norm"]
    assert summary["protocols"]["val_norm"]["untrained"] is None  # not measured on this split


def test_a_dry_run_measures_nothing(tmp_path):
    def never(model, dataset):
        raise AssertionError

    Run(tmp_path / "run", device="cpu", dry_run=True).measure_untrained(Classifier(), build("digits"), never)


FAILING = """
import torch
from vitkit import Run, heads
class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = heads.build("linear", in_dim=64, out_dim=10)
    def forward(self, batch):
        return {"loss": torch.nn.functional.cross_entropy(self.head(batch["images"].flatten(1)), batch["labels"])}
def main(run: Run, fails: int = 2):
    data, model = run.dataset("digits", default="digits"), Classifier()
    batches = data.train.stratified_subset(64).batches(32)
    for epoch in run.fit(model, batches, epochs=2, optimizer=torch.optim.SGD(model.parameters(), 0.1)):
        if epoch.number == fails:
            raise ArithmeticError("in the evaluation")
    run.save(model)
"""


@pytest.mark.parametrize(("fails", "saved"), [(1, False), (2, True)])
def test_an_error_after_the_last_step_does_not_lose_the_model(shell, tmp_path, fails, saved):
    (tmp_path / "failing.py").write_text(FAILING)
    done = shell("run", "failing.py", "--out", "run", "--fails", str(fails), "--device", "cpu")
    assert done.returncode == 1
    assert "ArithmeticError: in the evaluation" in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists() is saved
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_run_that_was_killed_is_noted_when_it_resumes(run, tmp_path):
    for _ in fit(run, Classifier(), small(), epochs=2):
        break
    run.close()  # as a kill leaves it: the status is "running"
    resumed = Run(run.directory, device="cpu", precision="fp32", resume=True)
    resumed.close()
    assert "the run stopped here without a message: its process was killed" in (run.directory / "log.txt").read_text()


def test_the_first_rank_that_notices_the_death_of_rank_0_writes_for_it(run, tmp_path, monkeypatch):
    for _ in fit(run, Classifier(), small(), epochs=2):
        break
    other = run.session
    claim, other.claim, other.is_main = other.claim, None, False
    monkeypatch.setattr(type(other.accelerator), "process_index", 1)
    other.alarm("rank 0 lives")
    assert "rank 0 lives" not in (run.directory / "log.txt").read_text()  # its lock is held
    claim.release()
    other.alarm("another rank has failed, so this one stops")
    assert "rank 1: another rank has failed, so this one stops; resume with:" in (run.directory / "log.txt").read_text()
    assert json.loads((run.directory / "summary.json").read_text())["status"] == "failed"


def test_the_scale_of_fp16_is_in_the_checkpoint(tmp_path):
    def scaled(resume):
        run = Run(tmp_path / "run", device="cpu", precision="fp32", resume=resume)
        run.session.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=3)
        return run

    run = scaled(resume=False)
    for _ in fit(run, Classifier(), small(), epochs=4):
        if run.session.steps_taken == 4:
            break
    scale = run.session.accelerator.scaler.state_dict()
    run.close()
    resumed = scaled(resume=True)
    next(fit(resumed, Classifier(), small(), epochs=4))
    resumed.close()
    assert scale["scale"] == 256.0
    assert resumed.session.accelerator.scaler.state_dict() == scale


class Share:
    """An evaluator of a number that is given, with its protocol."""

    def __init__(self, value):
        self.value = value

    def __call__(self, model, data, split="test"):
        name = "share" if split == "test" else f"{split}_share"
        return Scores({name: self.value}, protocols={name: Measurement(split, 10, note="given")})


def test_after_the_loop_scores_join_the_row_of_the_last_epoch(run):
    data, model = build("digits").resized(8), Classifier()
    with pytest.raises(UsageError, match="run.evaluate comes after the loop over run.fit; in the loop use epoch.evaluate"):
        run.evaluate(model, data, Share(0.5))
    for epoch in fit(run, model, data.train.batches(650), epochs=2):
        epoch.evaluate(model, data, Share(0.1 * epoch.number), split="val")
    scores = run.evaluate(model, data, Share(0.5), note="weights of epoch 1")
    assert dict(scores) == {"share": 0.5}
    row = run.session.history.metrics[-1]
    assert (row["epoch"], row["val_share"], row["share"]) == (2, 0.2, 0.5)
    assert [kept["val_share"] for kept in run.session.history.metrics] == [0.1, 0.2]
    assert run.session.history.protocols["share"]["note"] == "given; weights of epoch 1"
    assert run.session.history.protocols["val_share"]["note"] == "given"
    with pytest.raises(UsageError, match="share of epoch 2 was logged before; measure it in the loop, or after it, not both"):
        run.evaluate(model, data, Share(0.6))


def test_after_the_loop_scores_have_a_row_of_their_own_where_the_last_epoch_was_not_evaluated(run):
    data, model = build("digits").resized(8), Classifier()
    for _ in fit(run, model, data.train.batches(650), epochs=1):
        pass
    run.evaluate(model, data, Share(0.5))
    assert [(row["epoch"], row["share"]) for row in run.session.history.metrics] == [(1, 0.5)]
