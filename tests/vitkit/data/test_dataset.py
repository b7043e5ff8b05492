"""Datasets by name: the store, the fallback and when there is none, and what a dataset says of itself."""

import threading
from pathlib import Path

import pytest
import torch

from vitkit import datasets
from vitkit.contracts import Dataset
from vitkit.data.dataset import ImageDataset, build, fetched, from_store, imported, resolve
from vitkit.data.store import Stored, read_store, store_path, stored_names, write_store
from vitkit.errors import ArgumentsError, DatasetError, MissingDatasetError, UnknownNameError, UsageError


def tensors(n: int = 20, channels: int = 3, size: int = 8) -> dict[str, torch.Tensor]:
    made = {}
    for seed, split in enumerate(("train", "test")):
        generator = torch.Generator().manual_seed(seed)
        made[f"{split}.images"] = torch.randint(
            0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator
        )
        made[f"{split}.labels"] = torch.arange(n) % 2
    return made


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITKIT_DATA", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered dataset that can be neither found nor downloaded."""
    monkeypatch.setattr(datasets, "_added", {})

    def fetch():
        raise OSError("https://example.org/far.tar:\n <urlopen error no route to host>")

    def far(*, img_size: int | None = None) -> ImageDataset:
        return from_store(fetched("far", fetch), img_size=img_size)

    datasets.add("far", far)
    return "far"


def test_a_dataset_follows_the_contract_and_keeps_its_tensors():
    made = tensors()
    found = from_store(Stored("pets", ["cat", "dog"], made), source="here", licence="mine", val_size=0)
    assert isinstance(found, Dataset)
    assert (found.name, found.classes, found.shape) == ("pets", ["cat", "dog"], (3, 8, 8))
    assert (found.source, found.licence, found.fallback_for, found.notice) == ("here", "mine", None, "")
    assert found.train.images.data_ptr() == made["train.images"].data_ptr()
    assert torch.equal(found.test.labels, made["test.labels"])


def test_batches_of_the_training_split_have_mean_zero_and_deviation_one():
    found = from_store(Stored("pets", ["cat", "dog"], tensors()))
    images = next(found.train.batches(len(found.train)).epoch(0))["images"]
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_a_blank_channel_stays_finite():
    made = tensors(channels=1)
    made["train.images"] = torch.zeros_like(made["train.images"])
    found = from_store(Stored("blank", ["a", "b"], made))
    assert next(found.train.batches(4).epoch(0))["images"].isfinite().all()


def test_another_size_is_delivered_from_the_same_file():
    found = from_store(Stored("pets", ["cat", "dog"], tensors()), img_size=12)
    assert found.shape == (3, 12, 12)
    assert next(found.test.batches(5).epoch(0))["images"].shape == (5, 3, 12, 12)
    again = found.resized(6)
    assert again.shape == again.train.preprocessing.shape == again.val.preprocessing.shape == again.test.preprocessing.shape == (3, 6, 6)
    assert again.train.images is found.train.images
    for size in (0, -4):
        with pytest.raises(UsageError, match=f"img_size is {size}; expected at least 1"):
            found.resized(size)


def test_what_was_imported_is_found_by_its_name():
    write_store("pets", tensors(), ["cat", "dog"], skipped=["x.png: broken"])
    for found in (
        build("pets", img_size=6),
        resolve("pets", default="mnist", img_size=6),
        imported("pets", img_size=6),
    ):
        assert (found.name, found.shape, found.skipped) == ("pets", (3, 6, 6), ["x.png: broken"])
    with pytest.raises(ArgumentsError, match="dataset 'pets' takes no argument 'image_size'; did you mean 'img_size'"):
        build("pets", image_size=6)


def test_an_unknown_name_says_what_is_registered_and_what_is_stored():
    with pytest.raises(UnknownNameError, match=r"no dataset named 'mnits'; did you mean 'mnist'.*known: .*digits"):
        build("mnits")
    write_store("pets", tensors(), ["cat", "dog"])
    with pytest.raises(UnknownNameError, match=r"no dataset named 'pet'.*in the store: pets; did you mean 'pets'\?"):
        resolve("pet", default="mnist")


def test_auto_is_the_recipes_own_dataset():
    write_store("pets", tensors(), ["cat", "dog"])
    found = resolve("auto", default="pets")
    assert (found.name, found.fallback_for, found.notice) == ("pets", None, "")


def test_auto_falls_back_to_digits_and_says_so(unreachable):
    found = resolve("auto", default=unreachable, img_size=16)
    assert (found.name, found.fallback_for, found.shape) == ("digits", "far", (1, 16, 16))
    assert found.spec.name == "digits"
    assert "far is neither in the dataset store nor could it be downloaded" in found.notice
    assert "training on scikit-learn's digits instead" in found.notice
    assert "These numbers are NOT far's." in found.notice
    assert stored_names() == []


def test_a_dataset_named_by_hand_never_falls_back(unreachable):
    with pytest.raises(MissingDatasetError) as caught:
        resolve(unreachable, default="mnist")
    said = str(caught.value)
    assert said.startswith(
        f"dataset 'far' is not in the store ({store_path('far')}) and could not be downloaded: OSError:"
    )
    assert "https://example.org/far.tar: <urlopen error no route to host>" in said  # what was tried
    assert "run `vitkit data get far` and copy the file there, or use --dataset digits" in said


def test_auto_does_not_fall_back_over_a_broken_file(unreachable, store):
    store.mkdir()
    store_path("far").write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match=r"far\.safetensors is cut short or no store file"):
        resolve("auto", default=unreachable)


def test_a_download_is_made_once_and_read_from_the_store():
    calls = []

    def fetch():
        calls.append(1)
        return tensors(), ["cat", "dog"]

    first = fetched("pets", fetch)
    assert torch.equal(fetched("pets", fetch).train.images, first.train.images)
    assert calls == [1]
    assert read_store(store_path("pets")).classes == ["cat", "dog"]


def test_several_that_want_one_dataset_download_it_once():
    calls, found, ready = [], [], threading.Barrier(4)

    def fetch():
        calls.append(1)
        return tensors(), ["cat", "dog"]

    def want():
        ready.wait()
        found.append(fetched("pets", fetch))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 4


def test_what_a_download_brings_is_checked_before_it_is_kept():
    bad = tensors() | {"train.labels": torch.full((20,), 7)}
    with pytest.raises(
        DatasetError, match="dataset 'pets' cannot be stored: train.labels run from 7 to 7, expected 0 to 1"
    ):
        fetched("pets", lambda: (bad, ["cat", "dog"]))
    assert stored_names() == []


def test_a_validation_split_comes_off_the_training_images_by_class_and_is_the_same_each_time():
    made = tensors(n=200)
    first, again = (from_store(Stored("pets", ["cat", "dog"], made)) for _ in range(2))
    assert (len(first.train), len(first.val), len(first.test)) == (180, 20, 200)
    assert first.val.labels.bincount().tolist() == [10, 10]
    assert first.val_note == "20 of 200 training images, stratified, seed 0"
    assert torch.equal(first.val.images, again.val.images)
    pixels = [tuple(image.flatten().tolist()) for split in (first.train, first.val) for image in split.images]
    assert sorted(pixels) == sorted(tuple(image.flatten().tolist()) for image in made["train.images"])
    few = from_store(Stored("pets", ["cat", "dog"], made), val_size=6)
    assert (len(few.train), len(few.val)) == (194, 6)
    everything = from_store(Stored("pets", ["cat", "dog"], made), val_size=0)
    assert (len(everything.train), len(everything.val)) == (200, 0)
    assert everything.train.images.data_ptr() == made["train.images"].data_ptr()  # nothing is copied
    assert everything.val_note == "none: all training images are used for training"
    with pytest.raises(UsageError, match="val_size is -1; expected at least 0"):
        from_store(Stored("pets", ["cat", "dog"], made), val_size=-1)


def test_at_most_five_thousand_images_are_for_validation():
    labels = torch.arange(60_000) % 10
    made = {"train.images": torch.zeros(60_000, 1, 1, 1, dtype=torch.uint8), "train.labels": labels}
    made |= {"test.images": made["train.images"][:10], "test.labels": labels[:10]}
    found = from_store(Stored("many", [str(n) for n in range(10)], made))
    assert (len(found.train), len(found.val)) == (55_000, 5000)
    assert found.val.labels.bincount().tolist() == [500] * 10


def test_a_dataset_that_has_a_validation_split_keeps_it():
    made = tensors() | {"val.images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "val.labels": torch.tensor([0, 1, 1, 1])}
    found = from_store(Stored("pets", ["cat", "dog"], made))
    assert (len(found.train), found.val.labels.tolist()) == (20, [0, 1, 1, 1])
    assert found.val_note == "4 images of the validation split that pets has"
    with pytest.raises(UsageError, match="val_size is 3, but pets has a validation split; leave val_size out"):
        from_store(Stored("pets", ["cat", "dog"], made), val_size=3)


def test_a_dataset_that_a_plugin_builds_from_two_splits_has_a_validation_split():
    whole = from_store(Stored("pets", ["cat", "dog"], tensors(n=50)), val_size=0)
    found = ImageDataset("pets", ["cat", "dog"], train=whole.train, test=whole.test)
    assert isinstance(found, Dataset)
    assert (len(found.train), len(found.val)) == (45, 5)
    assert (len(found.resized(4).train), len(found.resized(4).val)) == (45, 5)


def test_a_digest_identifies_the_data_whatever_its_name_and_size():
    made = tensors()
    digest = from_store(Stored("pets", ["cat", "dog"], made)).digest
    assert len(digest) == 16
    assert from_store(Stored("other", ["cat", "dog"], made), img_size=4).digest == digest
    swapped = {name: 1 - value if name.endswith("labels") else value for name, value in made.items()}
    darker = made | {"test.images": made["test.images"] // 2}
    for other in (
        Stored("pets", ["dog", "cat"], made),
        Stored("pets", ["cat", "dog"], swapped),
        Stored("pets", ["cat", "dog"], darker),
    ):
        assert from_store(other).digest != digest


def test_unlabelled_images_are_a_dataset_too():
    made = tensors() | {name: torch.full((20,), -1) for name in ("train.labels", "test.labels")}
    write_store("photos", made, [])
    found = build("photos")
    assert (found.classes, len(found.train), len(found.val)) == ([], 18, 2)
    assert next(found.train.batches(4).epoch(0))["labels"].tolist() == [-1] * 4
