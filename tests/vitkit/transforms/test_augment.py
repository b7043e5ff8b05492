"""Augmentations: each image gets parameters of its own, within the ranges, the same from the same generator."""

import pytest
import torch

from vitkit.errors import UsageError
from vitkit.transforms.augment import (
    ColorJitter,
    Compose,
    GaussianBlur,
    Geometric,
    Grayscale,
    HorizontalFlip,
    Noise,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Solarize,
)
from vitkit.transforms.functional import grey, sample
from vitkit.transforms.randaugment import RandAugment

N = 64
ALL = [
    RandomAffine(degrees=30, translate=0.2, scale=(0.7, 1.3), shear=15),
    RandomResizedCrop(),
    RandomCrop(4),
    HorizontalFlip(0.5),
    ColorJitter(0.4, 0.4, 0.4, 0.1),
    ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.5),
    Grayscale(0.5),
    GaussianBlur(3),
    Solarize(0.5, p=0.5),
    RandomErasing(),
    Noise(0.2),
    RandAugment(),
]
ALL.append(Compose(list(ALL)))
CHANCY = [
    HorizontalFlip,
    Grayscale,
    Solarize,
    RandomErasing,
    lambda p: GaussianBlur(3, (0.5, 2.0), p=p),
    lambda p: ColorJitter(0.4, 0.4, 0.4, 0.1, p=p),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    """One picture, many times."""
    return torch.rand(1, channels, height, width, generator=generator(5)).repeat(N, 1, 1, 1)


def name(value) -> str:
    return type(value).__name__


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transform", ALL, ids=name)
def test_shape_type_and_range_stay(transform, channels):
    given = images(channels, 16, 12)
    before = given.clone()
    found = transform(given, generator())
    assert found.shape == given.shape
    assert found.dtype == torch.float32
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
    assert torch.equal(given, before)


@pytest.mark.parametrize("transform", ALL, ids=name)
def test_each_image_gets_parameters_of_its_own(transform):
    found = transform(images(), generator())
    kinds = len({tuple(image.flatten().tolist()) for image in found})
    few = isinstance(transform, HorizontalFlip | Grayscale | Solarize)
    assert kinds == 2 if few else kinds > N / 3


@pytest.mark.parametrize("transform", ALL, ids=name)
def test_choices_come_from_the_generator_alone(transform):
    torch.manual_seed(0)
    first = transform(images(), generator(3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(transform(images(), generator(3)), first)
    assert not torch.equal(transform(images(), generator(4)), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("transform", ALL, ids=name)
def test_the_memory_layout_makes_no_difference(transform):
    given = images().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(transform(given, generator()), transform(images(), generator()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", ALL, ids=name)
def test_autocast_does_not_coarsen(transform):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = transform(images(), generator())
    torch.testing.assert_close(inside, transform(images(), generator()))


@pytest.mark.parametrize("transform", ALL, ids=name)
def test_an_empty_batch_stays_empty(transform):
    assert transform(images()[:0], generator()).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("make", CHANCY)
def test_p_is_the_share_of_images_that_change(make):
    given = torch.rand(400, 3, 8, 8, generator=generator(2))
    changed = (make(p=0.3)(given, generator()) - given).abs().amax(dim=(1, 2, 3)) > 1e-4
    assert 0.2 < changed.float().mean() < 0.4
    torch.testing.assert_close(make(p=0.0)(given, generator()), given, atol=1e-5, rtol=0)
    assert ((make(p=1.0)(given, generator()) - given).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_geometric_neighbours_are_sampled_once(monkeypatch):
    calls = []
    monkeypatch.setattr("vitkit.transforms.augment.sample", lambda *a, **k: calls.append(k["padding_mode"]) or sample(*a, **k))
    Compose([RandomResizedCrop(), HorizontalFlip()])(images(), generator())
    assert calls == ["border"]
    Compose([RandomResizedCrop(), RandomAffine(10), RandomCrop(), Noise(), HorizontalFlip()])(images(), generator())
    assert calls[1:] == ["zeros", "border"]
    Compose([Noise(), Solarize()])(images(), generator())
    Compose([])(images(), generator())
    assert len(calls) == 3


class Turn(Geometric):
    """A quarter turn, and a half-size move right, in whole pixels, so that sampling loses nothing."""

    def __init__(self, rows):
        self.rows = rows

    def matrices(self, images, generator):
        return torch.tensor([*self.rows, [0.0, 0.0, 1.0]]).repeat(len(images), 1, 1)


def test_a_composition_does_what_its_parts_do_one_after_another():
    """A stranger's geometric transforms take part; the order is that of the list."""
    turn, half = Turn([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]), Turn([[1.0, 0.0, -0.5], [0.0, 1.0, 0.0]])
    for first, second in ((turn, half), (half, turn)):
        one_by_one = second(first(images(), generator()), generator())
        torch.testing.assert_close(Compose([first, second])(images(), generator()), one_by_one, atol=1e-5, rtol=0)
    there, back = Turn([[1.0, 0.0, -0.5], [0.0, 1.0, 0.0]]), Turn([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(Compose([there, back])(images(), generator()), images(), atol=1e-5, rtol=0)


def test_a_flip_is_a_flip():
    assert torch.equal(HorizontalFlip(1.0)(images(3, 5, 8), generator()), images(3, 5, 8).flip(-1))


def test_a_padded_crop_moves_by_whole_pixels():
    given = images(3, 8, 12)
    padded = torch.nn.functional.pad(given[0], (2, 2, 2, 2))
    expected = {(y, x): padded[:, y : y + 8, x : x + 12] for y in range(5) for x in range(5)}
    seen = set()
    for image in RandomCrop(2)(given, generator()):
        place = next(key for key, crop in expected.items() if torch.equal(crop, image))
        seen.add(place)
    assert len(seen) > 15


@pytest.mark.parametrize("size", [(28, 28), (33, 224)])
def test_mirrored_crops_are_copied_pixel_by_pixel(size):
    """Both in one, in either order: the pixels of one of the images that torch's pad, slice and flip make."""
    given = torch.rand(8, 3, *size, generator=generator(6))
    for transforms in ([RandomCrop(3), HorizontalFlip()], [HorizontalFlip(), RandomCrop(3)]):
        mirrored = 0
        for image, found in zip(given, Compose(transforms)(given, generator()), strict=True):
            padded = torch.nn.functional.pad(image, (3, 3, 3, 3))
            crops = [padded[:, y : y + size[0], x : x + size[1]] for y in range(7) for x in range(7)]
            plain, flipped = (sum(torch.equal(found, crop) for crop in each) for each in (crops, [c.flip(-1) for c in crops]))
            assert plain + flipped == 1
            mirrored += flipped
        assert 0 < mirrored < 8


def test_moves_by_whole_pixels_are_interpolated_among_others():
    turned = Compose([RandomCrop(2), RandomAffine(30)])(images(), generator())
    assert torch.isin(RandomCrop(2)(images(), generator()), torch.cat([images().flatten(), torch.zeros(1)])).all()
    assert not torch.isin(turned, torch.cat([images().flatten(), torch.zeros(1)])).float().mean() > 0.5


def test_crops_have_the_area_and_the_shape_asked_for():
    given = images(3, 20, 40)
    matrices = RandomResizedCrop(scale=(0.1, 0.2), ratio=(0.5, 2.0)).matrices(given, generator())
    wide, high = matrices[:, 0, 0], matrices[:, 1, 1]
    assert ((wide * high > 0.0999) & (wide * high < 0.2001)).all()
    ratio = wide * 40 / (high * 20)
    assert ((ratio > 0.499) & (ratio < 2.001)).all()
    assert ratio.std() > 0.2
    for middle, side in ((matrices[:, 0, 2], wide), (matrices[:, 1, 2], high)):
        assert ((middle.abs() + side) <= 1 + 1e-6).all()
    torch.testing.assert_close(RandomResizedCrop((1, 1), (2, 2))(given, generator()), given, atol=1e-5, rtol=0)


def test_a_crop_of_a_white_image_is_white():
    """Nothing black is mixed in at the image's own edge."""
    white = torch.ones(N, 1, 8, 8)
    torch.testing.assert_close(Compose([RandomResizedCrop(), HorizontalFlip()])(white, generator()), white)


def test_erased_rectangles_have_the_area_asked_for():
    white = torch.ones(500, 1, 40, 20)
    erased = RandomErasing(p=1.0, scale=(0.1, 0.2), ratio=(0.5, 2.0))(white, generator()) == 0
    area = erased.float().mean(dim=(1, 2, 3))
    assert ((area > 0.07) & (area < 0.24)).all()  # whole pixels round
    rows, columns = erased.any(3).sum(2), erased.any(2).sum(2)
    assert torch.equal(rows * columns, erased.sum(dim=(2, 3)))
    assert 0.4 < (columns / rows).min() < (columns / rows).max() < 2.4
    assert erased.any(dim=0).any(dim=1).all()  # every column and every row now and then
    assert erased.any(dim=0).any(dim=2).all()


def test_grey_solarised_and_noisy_images():
    given = images()
    assert torch.equal(Grayscale(1.0)(given, generator()), grey(given).expand_as(given))
    assert torch.equal(Solarize(0.5, p=1.0)(given, generator()), torch.where(given >= 0.5, 1 - given, given))
    middle = torch.full((2000, 1, 8, 8), 0.5)
    noise = Noise(0.1)(middle, generator()) - 0.5
    strengths = noise.std(dim=(1, 2, 3))
    assert strengths.max() < 0.15
    assert abs(strengths.mean() - 0.05) < 0.005
    assert abs(noise.mean()) < 1e-3


def test_an_affine_of_nothing_changes_nothing():
    torch.testing.assert_close(RandomAffine()(images(), generator()), images(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RandomResizedCrop(scale=(0.0, 1.0)), "scale is (0.0, 1.0); expected two positive numbers"),
        (
            lambda: RandomResizedCrop(ratio=(2.0, 1.0)),
            "ratio is (2.0, 1.0); expected two positive numbers, the smaller",
        ),
        (lambda: RandomAffine(scale=(-1.0, 1.0)), "scale is (-1.0, 1.0)"),
        (lambda: RandomErasing(ratio=(0.0, 1.0)), "ratio is (0.0, 1.0)"),
        (lambda: GaussianBlur(sigma=(0.0, 1.0)), "sigma is (0.0, 1.0)"),
        (lambda: RandomCrop(-1), "padding is -1; expected at least 0"),
        (lambda: ColorJitter(hue=0.7), "hue is 0.7; expected a number in [0, 0.5]"),
        (lambda: ColorJitter(brightness=-0.1), "brightness is -0.1; expected at least 0"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(make, said):
    with pytest.raises(UsageError) as caught:
        make()
    assert said in str(caught.value)
