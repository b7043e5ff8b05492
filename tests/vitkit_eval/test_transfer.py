"""Transfer: another dataset as the model takes it, and its own pixels by the same protocol."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vitkit import data, evaluators
from vitkit.data import Preprocessing, write_store
from vitkit.errors import UnknownNameError, UsageError
from vitkit_eval import KNN, LinearProbe, Transfer, adapted, frozen_features


class Watched(nn.Module):
    """Twice the pixels; it remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return 2 * images.flatten(1)


@pytest.fixture
def colours(tmp_path, monkeypatch) -> str:
    """A dataset in the store: 6×6, three channels, three classes."""
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", 90), ("test", 30), ("val", 30)):
        labels = torch.arange(n) % 3
        noise = torch.randint(0, 120, (n, 3, 6, 6), generator=generator)
        noise[torch.arange(n), labels] += 60
        tensors |= {f"{split}.images": noise.to(torch.uint8), f"{split}.labels": labels}
    write_store("colours", tensors, ["red", "green", "blue"])
    return "colours"


def test_the_encoder_sees_the_other_dataset_as_its_own_and_the_pixels_stand_beside_it(dataset, colours):
    model = Watched()
    evaluator = evaluators.build("transfer", dataset=colours, k=5)
    scores = evaluator(model, dataset)
    assert list(scores) == ["transfer_knn_top1", "transfer_linear_top1", "pixels_knn_top1", "pixels_linear_top1"]
    assert all(images.shape[1:] == (1, 4, 4) for images in model.seen)
    other = data.build(colours)
    other = replace(
        other, train=adapted(other.train, dataset.train.preprocessing), test=adapted(other.test, dataset.train.preprocessing)
    )
    assert torch.equal(model.seen[-1], next(iter(other.test.batches(30).epoch(0)))["images"])
    features = frozen_features(Watched(), other)
    expected = [probe.score(*features, other.classes) for probe in (KNN(k=5), LinearProbe())]
    assert [scores["transfer_knn_top1"], scores["transfer_linear_top1"]] == [next(iter(e.values())) for e in expected]
    # Twice the pixels are as near to one another by cosine as the pixels themselves.
    assert scores["pixels_knn_top1"] == scores["transfer_knn_top1"]
    assert scores["pixels_linear_top1"] == pytest.approx(scores["transfer_linear_top1"], abs=0.04)
    assert set(scores.figures) == {"transfer_knn_confusion", "transfer_linear_confusion"}
    protocol = scores.protocols["transfer_knn_top1"]
    assert (protocol.split, protocol.samples, protocol.chance, protocol.frozen) == ("test", 30, 1 / 3, "encoder")
    assert protocol.note == "on colours: 5 nearest of 90 training images, cosine, T=0.07"
    assert scores.protocols["pixels_linear_top1"].frozen == "nothing learned"
    assert evaluator(model, dataset) == scores


def test_pixels_are_measured_once_for_each_way_of_showing_them(dataset, colours, monkeypatch):
    counted = []
    score = KNN.score
    monkeypatch.setattr(KNN, "score", lambda self, train, *rest, **more: (counted.append(train), score(self, train, *rest, **more))[1])
    evaluator = Transfer(dataset=colours, k=5, train_size=30, test_size=12)
    for _ in range(3):
        assert evaluator(Watched(), dataset).protocols["transfer_knn_top1"].samples == 12
    assert len(counted) == 4
    assert all(len(train.labels) == 30 for train in counted)
    evaluator(Watched(), dataset.resized(8))
    assert len(counted) == 6
    assert counted[-1].features.shape == (30, 64)


def test_images_are_adapted_in_size_channels_and_moments(dataset, colours):
    rgb = data.build(colours).test
    grey = adapted(rgb, Preprocessing((1, 6, 6), (0.25,), (0.5,)))
    reference = torch.stack(
        [torch.frombuffer(bytearray(Image.fromarray(one.permute(1, 2, 0).numpy()).convert("L").tobytes()), dtype=torch.uint8)
         for one in rgb.images]
    ).view(30, 1, 6, 6)  # fmt: skip
    assert (grey.images.int() - reference.int()).abs().max() <= 1  # they round elsewhere
    (batch,) = grey.batches(30).epoch(0)
    torch.testing.assert_close(batch["images"], (grey.images / 255 - 0.25) / 0.5)
    threefold = adapted(grey, Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, "pad"))
    (batch,) = threefold.batches(30).epoch(0)
    assert batch["images"].shape == (30, 3, 8, 8)
    assert torch.equal(batch["images"][:, 0], batch["images"][:, 2])
    padded = adapted(replace(grey, preprocessing=replace(grey.preprocessing, fit="pad")), Preprocessing((1, 8, 8), (0.0,), (1.0,)))
    (batch,) = padded.batches(30).epoch(0)
    torch.testing.assert_close(batch["images"][:, :, 1:7, 1:7], grey.images / 255)
    assert float(batch["images"][:, :, 0].abs().max()) == 0


def test_what_cannot_be_adapted_or_found_says_so(dataset, colours):
    with pytest.raises(UsageError, match="images have 3 channels, the model takes 4; only grey and RGB are turned into"):
        adapted(data.build(colours).train, Preprocessing((4, 6, 6), (0.0,) * 4, (1.0,) * 4))
    with pytest.raises(UnknownNameError, match="no dataset named 'colour'; .*; did you mean 'colours'"):
        evaluators.build("transfer", dataset="colour")
    with pytest.raises(UsageError, match="k is 99, but there are only 90 training images"):
        Transfer(dataset=colours, k=99)(Watched(), dataset)
