"""Monitors without labels: closed forms, collapse, augmented views, two processes as one."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vitkit import evaluators
from vitkit.contracts import Scores
from vitkit.errors import UsageError, VitkitError
from vitkit.models import Features
from vitkit.transforms import HorizontalFlip
from vitkit_eval import AlphaReQ, FeatureStd, LiDAR, RankMe
from vitkit_eval.collapse import lidar

NAMES = ["rankme", "alpha_req", "feature_std", "lidar"]


def scored(evaluator, features: Tensor) -> Scores:
    return evaluator.score(Features(features, torch.zeros(len(features), dtype=torch.int64)), [])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(d: int) -> Tensor:
    return torch.linalg.qr(gaussian(d, d, seed=3))[0]


def test_rankme_of_isotropic_features_is_their_dimension_and_of_a_line_one():
    assert scored(RankMe(), gaussian(20_000, 16))["rankme"] == pytest.approx(16, abs=0.01)
    line = gaussian(500, 1) @ gaussian(1, 16, seed=1)
    assert scored(RankMe(), line)["rankme"] == pytest.approx(1, abs=1e-3)
    assert scored(RankMe(), torch.ones(500, 16))["rankme"] == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_exponential_of_the_entropy_of_the_singular_values():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    features = torch.linalg.qr(gaussian(60, 4))[0] * values @ orthogonal(4)
    shares = values / values.sum()
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert scored(RankMe(), features)["rankme"] == pytest.approx(expected, rel=1e-4)
    assert scored(RankMe(), 1e3 * features)["rankme"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_recovered(alpha):
    eigenvalues = torch.arange(1, 33).double() ** -alpha
    left = gaussian(400, 32).double()
    left = torch.linalg.qr(left - left.mean(dim=0))[0]  # columns of mean zero
    features = left * (400 * eigenvalues).sqrt() @ orthogonal(32).double() + 5.0
    assert scored(AlphaReQ(), features.float())["alpha_req"] == pytest.approx(alpha, rel=1e-3)


def test_features_that_vary_in_one_direction_have_no_exponent():
    for features in (torch.ones(50, 8), gaussian(50, 1) @ gaussian(1, 8, seed=1)):
        with pytest.raises(UsageError, match="alpha_req needs features that vary in two directions at least; these have coll"):
            scored(AlphaReQ(), features)


def test_the_standard_deviation_is_one_on_the_sphere_and_zero_at_a_point():
    assert scored(FeatureStd(), gaussian(5_000, 32))["feature_std"] == pytest.approx(1, abs=0.01)
    assert scored(FeatureStd(), 1e3 * gaussian(5_000, 32))["feature_std"] == pytest.approx(1, abs=0.01)
    assert scored(FeatureStd(), gaussian(1, 32).expand(50, -1))["feature_std"] == pytest.approx(0, abs=1e-6)
    half = torch.cat([gaussian(5_000, 16), torch.zeros(5_000, 16)], dim=1)  # half of the dimensions are not used
    assert scored(FeatureStd(), half)["feature_std"] == pytest.approx(0.5**0.5, abs=0.01)


def test_lidar_counts_the_dimensions_that_tell_images_apart():
    images, noise = gaussian(4_000, 1, 12).double(), gaussian(4_000, 8, 12, seed=1).double()
    assert lidar(images + 0.1 * noise) == pytest.approx(12, abs=0.1)
    only_four = torch.cat([images[..., :4], torch.zeros(4_000, 1, 8)], dim=2) + 0.1 * noise
    assert lidar(only_four) == pytest.approx(4, abs=0.3)
    # A direction in which the views of one image differ by ten times as much does not count, though RankMe counts it.
    noise[..., 6:] *= 100
    assert lidar(images + 0.1 * noise) == pytest.approx(6, abs=0.3)


def test_lidar_without_noise_is_that_of_the_means_covariance():
    images = gaussian(5_000, 1, 6).double() * torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    shares = torch.tensor([4.0, 4.0, 1.0, 1.0, 1.0, 1.0]) / 12
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert lidar(images.expand(-1, 3, -1)) == pytest.approx(expected, rel=1e-2)


class Turned(nn.Module):
    """Pixels through a fixed linear map; it refuses an empty batch, as many a network does."""

    def encode_image(self, images: Tensor) -> Tensor:
        assert len(images) > 0
        return images.flatten(1) @ torch.linspace(-1, 1, 16 * 5).sin().view(16, 5)


def test_lidar_sees_augmented_views_of_each_image(dataset):
    seen = []

    class Watched(nn.Module):
        def encode_image(self, images):
            seen.append(images)
            return images.flatten(1)

    first = LiDAR(images=6, views=4, augment=HorizontalFlip())(Watched(), dataset)
    assert seen[0].shape == (24, 1, 4, 4)
    views = seen[0].unflatten(0, (6, 4))
    for image in views:
        assert all(torch.equal(view, image[0]) or torch.equal(view, image[0].flip(-1)) for view in image)
    assert LiDAR(images=6, views=4, augment=HorizontalFlip())(Watched(), dataset) == first
    protocol = first.protocols["lidar"]
    assert (protocol.split, protocol.samples, protocol.unit) == ("test", 6, "dimensions")
    assert protocol.note == "effective dimensions of 16, 4 augmented views of each image, δ=0.0001"


@pytest.mark.parametrize("name", NAMES)
def test_they_need_no_labels_and_name_their_split(dataset, name):
    unlabelled = replace(dataset, test=replace(dataset.test, labels=torch.full((45,), -1)))
    scores = evaluators.build(name)(Turned(), unlabelled)
    object.__setattr__(unlabelled, "val", unlabelled.test)
    on_val = evaluators.build(name)(Turned(), unlabelled, split="val")
    assert on_val == {f"val_{name}": pytest.approx(scores[name])}
    assert on_val.protocols[f"val_{name}"].split == "val"
    protocol = scores.protocols[name]
    assert (protocol.split, protocol.samples, protocol.frozen) == ("test", 45, "encoder")
    assert protocol.kind == "score"
    assert protocol.direction == ("min" if name == "alpha_req" else "max")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LiDAR(images=1), "images is 1; expected at least 2"),
        (lambda: LiDAR(views=1), "views is 1; expected at least 2"),
        (lambda: LiDAR(delta=0.0), "delta is 0.0; expected a finite positive number"),
        (lambda: RankMe(test_size=0), "test_size is 0; expected at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_what_cannot_be_measured_says_so(dataset):
    one = replace(dataset, test=dataset.test.subset(torch.arange(1)))
    with pytest.raises(UsageError, match="lidar compares images; the test split holds only one"):
        LiDAR().check(one)
    with pytest.raises(VitkitError, match="features are not finite: it has diverged"):
        LiDAR(images=4, views=2)(lambda images: images.flatten(2) * float("nan"), dataset)


def _measure(dataset) -> list[dict[str, float]]:
    return [dict(evaluators.build(name)(Turned(), dataset)) for name in NAMES]


def _worker(number: int, folder: str, dataset) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.save(_measure(dataset), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one(shades, tmp_path: Path):
    dataset = shades(test=45)
    expected = _measure(dataset)
    mp.spawn(_worker, (str(tmp_path), dataset), nprocs=2)
    for number in range(2):
        for scores, whole in zip(torch.load(tmp_path / f"{number}.pt"), expected, strict=True):
            assert scores == pytest.approx(whole)
