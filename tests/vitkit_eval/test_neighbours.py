"""Nearest images without labels: which view finds its image, chance after a collapse, and the sheet."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vitkit.contracts import UNLABELLED
from vitkit.data import ImageDataset, Stored, from_store
from vitkit.errors import UsageError
from vitkit.models import feature_cache
from vitkit.transforms import Compose, Noise
from vitkit_eval import Neighbours


class Pixels(nn.Module):
    def encode_image(self, images):
        return images.flatten(1)


class Collapsed(nn.Module):
    def encode_image(self, images):
        return torch.ones(len(images), 4)


def unlabelled(test: int = 20) -> ImageDataset:
    """Images that are each other's noise, in pairs that differ by little."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", 30), ("val", 10), ("test", test)):
        images = torch.randint(20, 236, ((n + 1) // 2, 3, 6, 6), generator=generator).repeat_interleave(2, 0)[:n]
        tensors[f"{split}.images"] = (images + torch.randint(0, 9, images.shape, generator=generator)).to(torch.uint8)
        tensors[f"{split}.labels"] = torch.full((n,), UNLABELLED)
    return from_store(Stored("unlabelled", [], tensors))


def test_views_that_equal_their_image_find_it_without_labels():
    scores = Neighbours(augment=Compose([]))(Pixels(), unlabelled())
    assert dict(scores) == {"view_top1": 1.0}
    protocol = scores.protocols["view_top1"]
    assert (protocol.split, protocol.samples, protocol.kind, protocol.chance) == ("test", 20, "proportion", 1 / 20)


def test_noise_hides_which_of_two_like_images_a_view_comes_from():
    value = Neighbours(augment=Noise(0.5))(Pixels(), unlabelled())["view_top1"]
    assert 0.2 < value < 1.0


def test_collapsed_features_score_chance():
    assert Neighbours()(Collapsed(), unlabelled())["view_top1"] == pytest.approx(1 / 20)


def test_a_row_of_the_sheet_is_an_image_and_the_others_nearest_to_it():
    data = unlabelled()
    sheet = Neighbours(rows=20)(Pixels(), data).figures["neighbours"]
    assert sheet.columns == 8
    assert sheet.images.shape == (160, 3, 6, 6)
    shown = np.rint(sheet.images * 255).astype(np.uint8).reshape(20, 8, 3, 6, 6)
    assert np.array_equal(shown[:, 0], data.test.images.numpy())
    partner = torch.arange(20) ^ 1
    assert np.array_equal(shown[:, 1], data.test.images[partner].numpy())
    assert sheet.captions[0] == "image"
    assert float(sheet.captions[1]) >= float(sheet.captions[2])


def test_it_measures_a_seeded_part_of_a_split_under_the_splits_name():
    scores = Neighbours(images=6)(Pixels(), unlabelled(), split="val")
    assert list(scores) == ["val_view_top1"]
    assert list(scores.figures) == ["val_neighbours"]
    assert scores.protocols["val_view_top1"].samples == 6
    assert dict(scores) == dict(Neighbours(images=6)(Pixels(), unlabelled(), split="val"))


def test_features_of_all_images_are_those_of_other_evaluators(monkeypatch):
    from vitkit_eval import RankMe

    calls, encode, model, data = [], Pixels.encode_image, Pixels(), unlabelled()
    monkeypatch.setattr(Pixels, "encode_image", lambda self, images: (calls.append(len(images)), encode(self, images))[1])
    with feature_cache():
        RankMe()(model, data)
        Neighbours()(model, data)
    assert calls == [20, 20]  # the images once, and the views


def test_images_that_are_too_few_and_arguments_out_of_range_are_refused():
    data = unlabelled()
    with pytest.raises(UsageError, match="neighbours compares images; the test split holds only one"):
        Neighbours().check(replace(data, test=data.test.subset(torch.arange(1))))
    with pytest.raises(UsageError, match="images is 1; expected at least 2"):
        Neighbours(images=1)
    with pytest.raises(UsageError, match="rows is 0; expected at least 1"):
        Neighbours(rows=0)
