"""Reconstruction errors are torchmetrics', active units those of Burda et al., on one process and on two."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit import evaluators
from vitkit.data import ImageDataset, Stored, from_store
from vitkit.errors import UsageError, VitkitError


def build_noise(test: int = 45) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", 30), ("test", test)):
        tensors[f"{split}.images"] = torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
        tensors[f"{split}.labels"] = torch.arange(n) % 3
    return from_store(Stored("noise", ["a", "b", "c"], tensors))


class Encoder(nn.Module):
    """Six numbers of an image: four at different scales, two that never change. It refuses an empty batch."""

    latent_dim = 6

    def __init__(self) -> None:
        super().__init__()
        scales = torch.tensor([1.0, 0.3, 0.2, 0.02, 0.0, 0.0])
        self.map = nn.Parameter(torch.linspace(-1, 1, 48 * 6).sin().view(48, 6) * 0.1 * scales)

    def encode_latent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert len(images) > 0
        mu = images.flatten(1) @ self.map + torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, 0.0])
        return mu, torch.full_like(mu, 3.0)


class Decoder(nn.Module):
    def __init__(self, num_classes: int | None = None, bias: float = 0.0) -> None:
        super().__init__()
        self.num_classes, self.bias = num_classes, bias

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = self.bias if labels is None else labels.view(-1, 1, 1, 1)
        return (z[:, :1].repeat(1, 48).unflatten(1, (3, 4, 4)) + shift).sigmoid()


def build_model(**kwargs) -> nn.Module:
    model = nn.Module()
    model.backbone, model.decoder = Encoder(), Decoder(**kwargs)
    return model


@pytest.fixture
def dataset() -> ImageDataset:
    return build_noise()


def test_errors_are_those_of_torchmetrics(dataset):
    from torchmetrics.image import PeakSignalNoiseRatio  # seconds, which the processes below need not wait for
    from torchmetrics.regression import MeanSquaredError

    model = build_model()
    scores = evaluators.build("reconstruction")(model, dataset)
    pixels = dataset.test.images / 255
    with torch.no_grad():
        found = model.decoder(model.backbone.encode_latent(dataset.test.preprocessing.normalise(pixels))[0])
    assert scores["reconstruction_mse"] == pytest.approx(float(MeanSquaredError()(found, pixels)), rel=1e-5)
    reference = PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert scores["reconstruction_psnr"] == pytest.approx(float(reference(found, pixels)), rel=1e-5)
    protocol = scores.protocols["reconstruction_mse"]
    assert (protocol.split, protocol.samples) == ("test", 45)
    assert protocol.chance == pytest.approx(float((pixels - pixels.mean(dim=0)).square().mean()), rel=1e-4)
    assert protocol.note == "from the latent's mean, pixels in [0, 1]; chance: the mean image"
    assert scores.protocols["reconstruction_psnr"].note.startswith("mean over images, from the latent's mean")
    sheet = scores.figures["reconstructions"]
    assert (len(sheet.images), sheet.columns) == (32, 8)
    assert model.training


def test_kinds_units_and_directions(dataset):
    protocols = {**evaluators.build("reconstruction")(build_model(), dataset).protocols}
    protocols |= evaluators.build("active_units")(build_model(), dataset).protocols
    assert {name: (p.kind, p.unit, p.direction) for name, p in protocols.items()} == {
        "reconstruction_mse": ("error", "", "min"),
        "reconstruction_psnr": ("score", "dB", "max"),
        "active_units": ("score", "dimensions", "max"),
    }


@pytest.mark.parametrize("name", ["reconstruction", "active_units"])
def test_on_the_validation_split_names_and_protocols_say_so(dataset, name):
    with_val = replace(dataset)
    object.__setattr__(with_val, "val", dataset.test.subset(torch.arange(30)))
    scores = evaluators.build(name)(build_model(), with_val, split="val")
    assert all(key.startswith("val_") for key in (*scores, *scores.figures))
    assert {(protocol.split, protocol.samples) for protocol in scores.protocols.values()} == {("val", 30)}


def test_images_need_no_labels_but_for_a_conditional_decoder(dataset):
    hidden = replace(dataset, test=dataset.test.mask_labels(0.4))
    for name in ("reconstruction", "active_units"):
        assert evaluators.build(name)(build_model(), hidden) == evaluators.build(name)(build_model(), dataset)
    with pytest.raises(UsageError, match="reconstruction with a conditional decoder needs labels, but 27 of 45 test images"):
        evaluators.build("reconstruction")(build_model(num_classes=3), hidden)


def test_a_perfect_reconstruction_counts_as_a_hundred_decibels(dataset):
    class Whole(nn.Module):
        latent_dim = 48

        def encode_latent(self, images):
            pixels = images * torch.tensor(dataset.std).view(-1, 1, 1) + torch.tensor(dataset.mean).view(-1, 1, 1)
            return pixels.flatten(1), images.flatten(1)

    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1))
    model.backbone, model.decoder = Whole(), nn.Unflatten(1, (3, 4, 4))
    scores = evaluators.build("reconstruction", test_size=9, shown=3)(model, dataset)
    assert scores["reconstruction_mse"] == pytest.approx(0, abs=1e-12)
    assert scores["reconstruction_psnr"] == pytest.approx(100)
    assert scores.protocols["reconstruction_mse"].samples == 9
    assert len(scores.figures["reconstructions"].images) == 6


def test_a_conditional_decoder_is_told_the_true_class_and_the_protocol_says_so(dataset):
    scores = evaluators.build("reconstruction")(build_model(num_classes=3), dataset)
    assert scores["reconstruction_mse"] != evaluators.build("reconstruction")(build_model(), dataset)["reconstruction_mse"]
    assert "the decoder gets the true class" in scores.protocols["reconstruction_mse"].note


def test_active_units_are_those_whose_mean_varies(dataset):
    model = build_model()
    mu = model.backbone.encode_latent(dataset.test.preprocessing.normalise(dataset.test.images / 255))[0].detach()
    variance = mu.double().var(dim=0, correction=0)
    assert variance[0] > 0.01 > variance[3] > 0
    scores = evaluators.build("active_units")(model, dataset)
    assert scores == {"active_units": float((variance > 0.01).sum())}
    assert 1 <= scores["active_units"] <= 3
    note = "of 6 latent dimensions, those whose mean varies by more than 0.01 over the images"
    assert scores.protocols["active_units"].note == note
    assert evaluators.build("active_units", threshold=1e-12)(model, dataset) == {"active_units": 4.0}
    assert evaluators.build("active_units", threshold=1e9)(model, dataset) == {"active_units": 0.0}
    del model.decoder
    assert evaluators.build("active_units")(model, dataset) == scores


def test_what_cannot_be_measured_says_so(dataset):
    model = build_model()
    with pytest.raises(UsageError, match=r"images are \(45, 3, 8, 8\); this model takes and makes \(n, 3, 4, 4\)"):
        model.backbone.encode_latent = lambda images: (images.flatten(1)[:, :6], torch.zeros(len(images), 6))
        evaluators.build("reconstruction")(model, dataset.resized(8))
    model = build_model(bias=float("nan"))
    with pytest.raises(VitkitError, match="the reconstructions are not finite: the model has diverged"):
        evaluators.build("reconstruction")(model, dataset)
    with torch.no_grad():
        model.backbone.map[0, 0] = float("inf")
    with pytest.raises(VitkitError, match="the latents are not finite: the model has diverged"):
        evaluators.build("active_units")(model, dataset)
    model = nn.Module()
    model.backbone = nn.Identity()
    with pytest.raises(UsageError, match=r"no decoder, which makes images \(it has backbone\)"):
        evaluators.build("reconstruction")(model, dataset)
    with pytest.raises(UsageError, match=r"backbone \(Identity\) offers no encode_latent"):
        evaluators.build("active_units")(model, dataset)
    with pytest.raises(UsageError, match="threshold is 0; expected a finite positive number"):
        evaluators.build("active_units", threshold=0)
    with pytest.raises(UsageError, match="shown is 0; expected at least 1"):
        evaluators.build("reconstruction", shown=0)


def _measure() -> list[dict[str, float]]:
    from vitkit_vae import evaluators as module

    module.BATCH_SIZE = 11  # in twos of 11: twice whole, and one image, so that one process has none
    found = [evaluators.build(name)(build_model(), build_noise()) for name in ("reconstruction", "active_units")]
    return [dict(scores) | {"chance": scores.protocols[next(iter(scores))].chance or 0.0} for scores in found]


def _worker(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.save(_measure(), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("vitkit_vae.evaluators.BATCH_SIZE", 11)
    expected = _measure()
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    for number in range(2):
        for found, whole in zip(torch.load(tmp_path / f"{number}.pt"), expected, strict=True):
            assert found == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}
