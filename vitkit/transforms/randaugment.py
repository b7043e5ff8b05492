"""RandAugment of whole batches: operations, their order and their signs drawn for each image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vitkit.errors import UsageError
from vitkit.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    chain,
    equalize,
    matrices_of,
    posterize,
    sample,
    solarize,
)
from vitkit.validation import at_least, in_range, one_of

MOVES = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 150 / 331, "translate_y": 150 / 331, "rotate": 30.0}
"""The strongest geometric operations: slopes, shares of the image's side, degrees."""
COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Images `(n c h w)` and strengths `(n,)` in [−1, 1]; the last two have none.
    "brightness": lambda images, strength: adjust_brightness(images, 1 + 0.9 * strength),
    "color": lambda images, strength: adjust_saturation(images, 1 + 0.9 * strength),
    "contrast": lambda images, strength: adjust_contrast(images, 1 + 0.9 * strength),
    "sharpness": lambda images, strength: adjust_sharpness(images, 1 + 0.9 * strength),
    "posterize": lambda images, strength: posterize(images, (8 - 4 * strength.abs()).round()),
    "solarize": lambda images, strength: solarize(images, 1 - strength.abs()),
    "autocontrast": lambda images, _: autocontrast(images),
    "equalize": lambda images, _: equalize(images),
}
OPERATIONS = ("identity", *MOVES, *COLOURS)


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` operations one after another, drawn for each image evenly from `operations` (Cubuk et al., arXiv 1909.13719).

    Their strength is `magnitude`/(`num_magnitude_bins` − 1) of the strongest. Shears, translations, rotations, brightness, colour,
    contrast and sharpness have a random sign. Neighbouring geometric operations are sampled once. Pixels beyond the edge are black.
    Images of one channel have no colour to change.

    Operations, ranges and defaults are those of torchvision's RandAugment, which draws them once for a whole batch. It also takes the
    nearest pixel where this class interpolates, and its posterize of bytes rounds differently from its posterize of floats, which is
    used here.

    Raises `UsageError` for an unknown operation, no operation, a negative `num_ops` and a magnitude outside its bins.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    operations: Sequence[str] = OPERATIONS

    def __post_init__(self) -> None:
        at_least(0, num_ops=self.num_ops)
        at_least(2, num_magnitude_bins=self.num_magnitude_bins)
        in_range(0, self.num_magnitude_bins - 1, magnitude=self.magnitude)
        for name in self.operations:
            one_of(OPERATIONS, operation=name)
        if not self.operations:
            raise UsageError(f"operations is empty; expected some of {', '.join(OPERATIONS)}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        shape = (self.num_ops, len(images))
        numbers = torch.tensor([OPERATIONS.index(name) for name in self.operations], device=images.device)
        chosen = numbers[torch.randint(len(numbers), shape, device=images.device, generator=generator)]
        sign = 1 - 2 * torch.randint(2, shape, device=images.device, generator=generator)
        strength = sign * (self.magnitude / (self.num_magnitude_bins - 1))
        return apply(images, chosen, strength)


def apply(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Apply the operations `chosen`, numbers in `OPERATIONS`, with `strength` in [−1, 1]: both `(r n)`, r rounds of one for each image."""
    first_colour = 1 + len(MOVES)
    still = torch.eye(3, device=images.device)
    moves = still.expand(len(images), 3, 3)
    moved = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    places = torch.arange(len(images), device=images.device)  # of each image in the sorted batch
    steps = _matrices(images, chosen.flatten(), strength.flatten()).view(*chosen.shape, 3, 3)
    for operation, level, step in zip(chosen, strength, steps, strict=True):
        # Images are sorted by operation and changed in place, which takes half the time of selecting them.
        order = operation.argsort(stable=True)
        images = images.index_select(0, places.index_select(0, order))
        places = order.argsort()
        counts = torch.bincount(operation, minlength=len(OPERATIONS)).tolist()
        # The moves of an image are sampled before its colours change, and at the end.
        colour = operation >= first_colour
        _sample(images, places, moves, moved & colour)
        moves = torch.where(colour[:, None, None], still, chain(moves, step))
        moved = ~colour & (moved | (operation > 0))
        groups, levels = (values.split(counts)[first_colour:] for values in (images, level.index_select(0, order)))
        for change, group, strengths in zip(COLOURS.values(), groups, levels, strict=True):
            if len(group):
                group.copy_(change(group, strengths))
    _sample(images, places, moves, moved)
    return images.index_select(0, places)


def _sample(images: Tensor, places: Tensor, matrices: Tensor, which: Tensor) -> None:
    """Sample the images for which `which` `(n,)` is true, in place; the i-th lies at `places[i]`."""
    group = which.nonzero()[:, 0]
    if len(group):
        place = places.index_select(0, group)
        images.index_copy_(0, place, sample(images.index_select(0, place), matrices.index_select(0, group)))


def _matrices(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """The matrices `(n 3 3)` of geometric operations, and the identity for other ones.

    As in torchvision shears keep the upper and the left edge, and translations are by whole pixels.
    """
    height, width = images.shape[2:]
    most = torch.tensor(list(MOVES.values()), device=images.device)[:, None]
    numbers = torch.arange(1, 1 + len(MOVES), device=images.device)[:, None]
    slope_x, slope_y, right, down, angle = (operation == numbers) * most * strength
    slope_x, slope_y = slope_x * (height / width), slope_y * (width / height)
    x, y = ((share * side).trunc() * (2 / side) for share, side in ((right, width), (down, height)))
    cos, sin = (angle * (math.pi / 180)).cos(), (angle * (math.pi / 180)).sin()
    # Each image has one move: in the sums all other terms are zero.
    return matrices_of(
        cos, slope_x - sin * (height / width), slope_x - x,
        slope_y + sin * (width / height), cos, slope_y - y,
    )  # fmt: skip


__all__ = ["COLOURS", "MOVES", "OPERATIONS", "RandAugment", "apply"]
