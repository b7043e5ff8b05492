"""RandAugment: each operation is torchvision's, drawn for each image, in an order of its own."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from vitkit.errors import UsageError
from vitkit.transforms.functional import sample
from vitkit.transforms.randaugment import COLOURS, MOVES, OPERATIONS, RandAugment, apply

THEIRS = dict(
    zip(
        OPERATIONS,
        ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
         "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
        strict=True,
    )
)  # fmt: skip
BINS = 31


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 8, channels: int = 3, height: int = 16, width: int = 16) -> Tensor:
    """Values k/255 as photographs have them: smooth, so that a rounding moves no pixel far."""
    coarse = torch.rand(n, channels, 4, 4, generator=generator(1))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 0.8 + 0.1
    return (smooth * 255).round() / 255


def torchvisions(image: Tensor, name: str, magnitude: int, sign: int) -> Tensor:
    """What torchvision's RandAugment does with one operation, by its own table."""
    reference = v2.RandAugment(interpolation=InterpolationMode.BILINEAR)
    levels, signed = reference._AUGMENTATION_SPACE[THEIRS[name]]
    found = levels(BINS, *image.shape[-2:])
    level = 0.0 if found is None else float(found[magnitude]) * (sign if signed else 1)
    return reference._apply_image_or_video_transform(image, THEIRS[name], level, InterpolationMode.BILINEAR, reference._fill)


def test_the_operations_are_torchvisions():
    assert list(THEIRS.values()) == list(v2.RandAugment._AUGMENTATION_SPACE)
    assert (RandAugment().num_ops, RandAugment().magnitude) == (v2.RandAugment().num_ops, v2.RandAugment().magnitude)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name, channels, size):
    given = images(8, channels, *size)
    given[0] = 0.5  # a single value
    signs, magnitudes = [1, -1] * 4, [0, 3, 9, 15, 20, 25, 29, 30]
    strength = torch.tensor([[sign * m / (BINS - 1) for sign, m in zip(signs, magnitudes, strict=True)]])
    found = apply(given, torch.full((1, 8), OPERATIONS.index(name)), strength)
    expected = [torchvisions(x, name, m, sign) for x, m, sign in zip(given, magnitudes, signs, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-4 if name in MOVES else 2e-5, rtol=0)


def test_operations_follow_one_another_image_by_image():
    """Any three in any order, against one operation at a time, each image alone."""
    n = 200
    given = images(n)
    chosen = torch.randint(len(OPERATIONS), (3, n), generator=generator(2))
    # Two moves are sampled once here and twice one by one, which blurs and loses what is moved out and back again: only
    # moves by whole pixels, in one direction, come to the same.
    for name in ("shear_x", "shear_y", "rotate"):
        chosen[chosen == OPERATIONS.index(name)] = OPERATIONS.index("translate_x")
    strength = torch.rand(3, n, generator=generator(3)) * 2 - 1
    strength[(chosen > 0) & (chosen <= len(MOVES))] *= strength[(chosen > 0) & (chosen <= len(MOVES))].sign()
    found = apply(given, chosen, strength)
    for i in range(n):
        one = given[i : i + 1]
        for r in range(3):
            one = apply(one, chosen[r : r + 1, i : i + 1], strength[r : r + 1, i : i + 1])
        # Between a sampling's rounding error and a threshold a pixel may fall to either side.
        assert ((found[i] - one[0]).abs() > 2e-4).float().mean() < 0.02


def test_neighbouring_moves_are_sampled_once(monkeypatch):
    seen = []
    monkeypatch.setattr("vitkit.transforms.randaugment.sample", lambda x, m, **k: seen.append(len(x)) or sample(x, m, **k))
    moves, colours = OPERATIONS.index("rotate"), OPERATIONS.index("contrast")
    order = torch.tensor([[moves, moves, moves], [moves, moves, colours], [moves, colours, moves], [colours, 0, colours]]).T
    found = apply(images(4), order, torch.full((3, 4), 0.3))
    assert seen == [1, 1, 2]  # before a colour of the third, before one of the second, at the end the first and third
    turned = tv.rotate(images(4)[0], 0.9 * 30, interpolation=InterpolationMode.BILINEAR)
    inner = (slice(None), slice(4, 12), slice(4, 12))
    torch.testing.assert_close(found[0][inner], turned[inner], atol=2e-4, rtol=0)


def test_every_operation_comes_about_as_often_with_either_sign(monkeypatch):
    seen = []
    monkeypatch.setattr("vitkit.transforms.randaugment.apply", lambda images, *drawn: seen.append(drawn) or images)
    RandAugment(num_ops=3)(images(1).expand(3000, 3, 16, 16), generator())
    ((chosen, strength),) = seen
    counts = torch.bincount(chosen.flatten(), minlength=len(OPERATIONS)) / chosen.numel()
    assert (counts - 1 / len(OPERATIONS)).abs().max() < 0.01
    assert set(strength.unique().tolist()) == {torch.tensor(0.3).item(), torch.tensor(-0.3).item()}
    assert 0.48 < (strength > 0).float().mean() < 0.52
    assert chosen.unique(dim=1).shape[1] > 1000  # orders of their own
    RandAugment(operations=["rotate", "equalize"])(images(), generator())
    assert set(seen[-1][0].unique().tolist()) == {OPERATIONS.index("rotate"), OPERATIONS.index("equalize")}


def test_no_operation_and_no_strength_change_nothing():
    given = images()
    assert torch.equal(RandAugment(num_ops=0)(given, generator()), given)
    weak = [*MOVES, "identity", "brightness", "color", "contrast", "sharpness", "solarize"]
    found = RandAugment(magnitude=0, operations=weak)(given, generator())
    torch.testing.assert_close(found, given, atol=1e-5, rtol=0)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="num_ops is -1; expected at least 0"):
        RandAugment(num_ops=-1)
    with pytest.raises(UsageError, match=r"magnitude is 31; expected a number in \[0, 30\]"):
        RandAugment(magnitude=31)
    with pytest.raises(UsageError, match="num_magnitude_bins is 1; expected at least 2"):
        RandAugment(magnitude=0, num_magnitude_bins=1)
    with pytest.raises(UsageError, match="operation is 'rotat'; did you mean 'rotate'.* expected 'identity', 'shear_x'"):
        RandAugment(operations=["rotat"])
    with pytest.raises(UsageError, match="operations is empty; expected some of identity"):
        RandAugment(operations=[])
    with pytest.raises(UsageError, match="colours need images of 1 or 3 channels; given 2"):
        RandAugment(operations=["contrast"])(images(4, 2), generator())


def test_the_table_is_complete():
    assert ("identity", *MOVES, *COLOURS) == OPERATIONS
    assert len(OPERATIONS) == 14
