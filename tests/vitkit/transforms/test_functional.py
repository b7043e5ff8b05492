"""Operations with a parameter for each image agree with torchvision's, which take one for all."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vitkit.errors import UsageError
from vitkit.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    affine_matrices,
    crop_resize,
    gaussian_blur,
    grey,
    matrices_of,
    sample,
)

N = 6


def images(channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(N, channels, height, width, generator=torch.Generator().manual_seed(0))


def between(low: float, high: float, seed: int = 1) -> torch.Tensor:
    return low + (high - low) * torch.rand(N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_affine_is_torchvisions(size, layout):
    given = images(3, *size).contiguous(memory_format=layout)
    angle, scale, shear = between(-180, 180), between(0.6, 1.5, 2), between(-30, 30, 3)
    x, y = torch.tensor([0, 1, -3, 2, 0, 4]), torch.tensor([2, -1, 0, 3, -2, 0])  # torchvision moves by whole pixels
    matrices = affine_matrices(given, angle=angle, scale=scale, shear=shear, translate=(x / size[1], y / size[0]))
    found = sample(given, matrices)
    for i in range(N):
        expected = tv.affine(
            given[i], float(angle[i]), [int(x[i]), int(y[i])], float(scale[i]), [float(shear[i]), 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )  # fmt: skip
        torch.testing.assert_close(found[i], expected, atol=2e-4, rtol=0)


def test_a_crop_is_torchvisions():
    given = images(3, 16, 20)
    boxes = [(0, 0, 8, 10), (8, 10, 8, 10), (3, 5, 7, 9), (0, 0, 16, 20), (4, 0, 12, 5), (15, 19, 1, 1)]  # top left h w
    top, left, high, wide = (torch.tensor(values, dtype=torch.float32) for values in zip(*boxes, strict=True))
    x, y = (2 * left + wide) / 20 - 1, (2 * top + high) / 16 - 1
    found = sample(given, matrices_of(wide / 20, 0.0, x, 0.0, high / 16, y), padding_mode="border")
    for i, (y0, x0, h, w) in enumerate(boxes):
        whole = tv.resized_crop(given[i], y0, x0, h, w, [16, 20], antialias=False)
        # Inside the crop's half-pixel rim; there torchvision repeats the crop's edge, and this reads on in the image.
        rows, columns = math.ceil(8 / h), math.ceil(10 / w)
        inner = (slice(None), slice(rows, 16 - rows), slice(columns, 20 - columns))
        torch.testing.assert_close(found[i][inner], whole[inner], atol=1e-5, rtol=0)


def test_sampling_with_the_identity_changes_nothing():
    given = images()
    torch.testing.assert_close(sample(given, torch.eye(3).repeat(N, 1, 1)), given, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, tv.adjust_brightness, 0.0, 2.0),
        (adjust_contrast, tv.adjust_contrast, 0.0, 2.0),
        (adjust_saturation, tv.adjust_saturation, 0.0, 2.0),
        (adjust_hue, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_colours_are_torchvisions(ours, theirs, low, high, channels):
    given = images(channels)
    given[0] = 0.25  # without any colour
    given[1, :, :4] = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)[:channels]
    factor = between(low, high)
    found = ours(given, factor)
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(given, factor, strict=True)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_neutral_parameters_change_nothing():
    given = images()
    for adjust in (adjust_brightness, adjust_contrast, adjust_saturation):
        assert torch.equal(adjust(given, torch.ones(N)), given)
    torch.testing.assert_close(adjust_hue(given, torch.zeros(N)), given, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        adjust_hue(adjust_hue(given, between(0, 0.5)), -between(0, 0.5)), given, atol=1e-5, rtol=0
    )


def test_what_is_given_stays_as_it_is():
    given = images()
    before = given.clone()
    for adjust in (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue):
        adjust(given, between(0.1, 0.5))
    gaussian_blur(given, between(0.5, 1), kernel_size=3)
    assert torch.equal(given, before)


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_blur_is_torchvisions(kernel_size):
    given, sigma = images(3, 9, 14), between(0.1, 2.0)
    found = gaussian_blur(given, sigma, kernel_size=kernel_size)
    expected = torch.stack([tv.gaussian_blur(x, kernel_size, float(s)) for x, s in zip(given, sigma, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel_size", [2, 0, 19])
def test_a_kernel_that_does_not_fit(kernel_size):
    with pytest.raises(UsageError, match=f"kernel_size is {kernel_size}; expected an odd number below 18 .* 9×14"):
        gaussian_blur(images(3, 9, 14), between(1, 2), kernel_size=kernel_size)


def test_grey_is_torchvisions():
    torch.testing.assert_close(grey(images()), tv.rgb_to_grayscale(images()), atol=1e-6, rtol=0)
    assert torch.equal(grey(images(1)), images(1))


@pytest.mark.parametrize(
    "change", [grey, lambda x: adjust_hue(x, between(0, 0.1)), lambda x: adjust_saturation(x, between(1, 2))]
)
def test_colours_need_one_or_three_channels(change):
    with pytest.raises(UsageError, match="colours need images of 1 or 3 channels; given 2"):
        change(images(2))


@pytest.mark.parametrize(("size", "shape"), [((16, 16), (40, 40)), ((32, 24), (20, 30)), ((7, 9), (64, 33)), ((20, 30), (20, 30))])
def test_crops_are_resized_as_torchvision_does_image_by_image(size, shape):
    """Each image with a box and a flip of its own, against `resized_crop` of one image at a time."""
    generator = torch.Generator().manual_seed(0)
    height, width = shape
    images = torch.rand(6, 3, height, width, generator=generator)
    boxes, matrices, expected = [], [], []
    for _ in range(12):
        high, wide = (int(torch.randint(3, side + 1, (), generator=generator)) for side in shape)
        top, left = (int(torch.randint(side - part + 1, (), generator=generator)) for side, part in ((height, high), (width, wide)))
        boxes.append((top, left, high, wide))
    for index, (top, left, high, wide) in enumerate(boxes):
        flip = -1.0 if index % 3 == 0 else 1.0
        crop = tv.resized_crop(images[index // 2], top, left, high, wide, list(size), antialias=True)
        expected.append(crop.flip(-1) if flip < 0 else crop)
        x, y = 2 * (left + wide / 2) / width - 1, 2 * (top + high / 2) / height - 1
        matrices.append([[flip * wide / width, 0, x], [0, high / height, y], [0, 0, 1]])
    found = crop_resize(images, torch.tensor(matrices), size)
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=0)


def test_a_crop_of_the_full_image_is_a_resize_and_no_images_give_none():
    images = torch.rand(2, 1, 20, 10)
    full = torch.eye(3).expand(4, 3, 3)
    found = crop_resize(images, full, (8, 12))
    expected = tv.resize(images, [8, 12], antialias=True)
    torch.testing.assert_close(found, expected.repeat_interleave(2, dim=0), atol=2e-5, rtol=0)
    assert crop_resize(images[:0], full[:0], (8, 12)).shape == (0, 1, 8, 12)
