"""The built-in datasets: converted as they should be, and true to the real images where these are at hand."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torchvision import datasets as published

from vitkit import datasets
from vitkit.contracts import Dataset
from vitkit.data import from_store, read_store, store_path, stored_names
from vitkit.errors import MissingDatasetError
from vitkit_data.builtin import WRITERS

BUILT_IN = {
    # torchvision's name, channels, side, classes, images a class for training
    "mnist": ("MNIST", 1, 28, 10, None),
    "fashion_mnist": ("FashionMNIST", 1, 28, 10, 6000),
    "cifar10": ("CIFAR10", 3, 32, 10, 5000),
    "cifar100": ("CIFAR100", 3, 32, 100, 500),
}


@pytest.fixture
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr("vitkit_data.download.require_answer", lambda urls: None)


def stand_in(name: str, downloads: list[str]):
    """What torchvision's class `name` looks like after a download, with small made-up images."""
    _, channels, side, count, _ = next(value for value in BUILT_IN.values() if value[0] == name)

    class StandIn:
        url = "https://example.org/file.tar.gz"
        classes = tuple(f"{index} - name" for index in range(count))

        def __init__(self, root, train, download):
            assert download
            downloads.append(root)
            print("Downloading")
            rng = np.random.default_rng(train)
            shape = (2 * count, side, side) if channels == 1 else (2 * count, side, side, channels)
            data = rng.integers(0, 256, shape, dtype=np.uint8)
            targets = [index % count for index in range(2 * count)]
            grey = channels == 1  # torchvision has tensors for the one kind, arrays and lists for the other
            self.data, self.targets = (torch.from_numpy(data), torch.tensor(targets)) if grey else (data, targets)

    return StandIn


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_download_is_converted_once(name, empty_store, reachable, monkeypatch, capsys):
    theirs, channels, side, count, _ = BUILT_IN[name]
    downloads = []
    monkeypatch.setattr(published, theirs, stand_in(theirs, downloads))
    found = datasets.build(name)
    assert isinstance(found, Dataset)
    assert (found.name, found.shape, len(found.classes)) == (name, (channels, side, side), count)
    assert found.classes[1] == ("1" if name == "mnist" else "1 - name")
    assert found.source
    assert found.licence
    original = getattr(published, theirs)("", True, True)
    expected = torch.as_tensor(original.data)
    expected = expected[:, None] if channels == 1 else expected.permute(0, 3, 1, 2)
    assert torch.equal(datasets.build(name, val_size=0).train.images, expected)
    assert (len(found.train), len(found.val)) == (count, count)
    assert found.test.labels.tolist() == [index % count for index in range(2 * count)]
    assert stored_names() == [name]
    assert len(downloads) == 3  # training and test split, and this test's own
    again = datasets.build(name, img_size=16)
    assert again.shape == (channels, 16, 16)
    assert len(downloads) == 3
    assert capsys.readouterr().out == "Downloading\n"  # this test's own


def test_a_failed_download_says_what_was_tried_and_what_to_do(empty_store, reachable, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(
            "Error downloading train.gz:\nTried https://mirror.example/, got:\n<urlopen error timed out>"
        )

    fail.url = "https://mirror.example/"
    monkeypatch.setattr(published, "CIFAR10", fail)
    with pytest.raises(MissingDatasetError) as caught:
        datasets.build("cifar10")
    said = str(caught.value)
    assert str(store_path("cifar10")) in said
    assert "Tried https://mirror.example/, got: <urlopen error timed out>" in said
    assert "`vitkit data get cifar10`" in said
    assert stored_names() == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_real_images_are_as_described(name, real_data):
    _, channels, side, count, each = BUILT_IN[name]
    found = datasets.build(name)
    assert found.train.images.shape == ((55_000 if channels == 1 else 45_000), channels, side, side)
    assert found.val.images.shape == (5000, channels, side, side)
    assert found.val_note == f"5,000 of {60_000 if channels == 1 else 50_000:,} training images, stratified, seed 0"
    assert found.test.images.shape == (10_000, channels, side, side)
    assert len(found.classes) == count
    counts = found.train.labels.bincount() + found.val.labels.bincount()
    assert counts.tolist() == [each] * count if each else 5000 < counts.min() < counts.max() < 7000
    computed = from_store(read_store(store_path(name)))
    assert np.allclose(computed.mean, found.mean, atol=5e-3)
    assert np.allclose(computed.std, found.std, atol=5e-3)


def test_mnist_at_32_pixels_is_lenets(real_data):
    found = datasets.build("mnist", img_size=32)
    assert found.shape == (1, 32, 32)
    assert found.classes == [str(digit) for digit in range(10)]
    images = found.train.preprocessing.pixels(found.train.images[:50])
    assert torch.equal(images[:, :, 2:30, 2:30], found.train.images[:50] / 255)
    assert images.count_nonzero() == found.train.images[:50].count_nonzero()


def test_digits_are_scikit_learns(empty_store):
    found = datasets.build("digits")
    theirs = load_digits()
    assert found.shape == (1, 8, 8)
    assert (len(found.train), len(found.val), len(found.test)) == (1287, 128, 382)
    assert found.train.images.max() == 255
    whole = {tuple(image.flatten().int().tolist()) for image in torch.from_numpy(theirs.images * 255 / 16).round()}
    ours = torch.cat([found.train.images, found.val.images, found.test.images]).flatten(1).int().tolist()
    assert {tuple(image) for image in ours} == whole
    share = found.train.labels.bincount() / found.test.labels.bincount()
    assert ((share > 3.0) & (share < 3.8)).all()
    assert torch.equal(found.test.images, datasets.build("digits").test.images)
    assert list(empty_store.iterdir()) == []  # nothing to download and nothing to keep


def test_no_writer_of_digits_is_in_two_splits():
    """Each writer began by writing 0 to 9 three times, which is where a block begins; splits begin there too."""
    targets = "".join(map(str, load_digits().target))
    for start in WRITERS:
        assert targets[start : start + 30] in ("0123456789" * 3, "0" + "123456789" * 3)
    found = datasets.build("digits")
    assert "split by writers" in found.source
    assert found.val_note == "128 images, a block of one writer who is not in the training images"


def test_digits_can_be_learnt_at_the_size_of_mnist():
    found = datasets.build("digits", img_size=28)
    train, test = (next(split.batches(2000).epoch(0)) for split in (found.train, found.test))
    assert train["images"].shape == (1287, 1, 28, 28)
    model = LogisticRegression(max_iter=200, C=0.01).fit(train["images"].flatten(1).numpy(), train["labels"].numpy())
    # Of writers it has not seen; 0.97 where writers are in both splits.
    assert model.score(test["images"].flatten(1).numpy(), test["labels"].numpy()) > 0.88
