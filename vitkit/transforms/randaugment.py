"""RandAugment of whole batches: operations, their order and their signs drawn for each image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vitkit.errors import UsageError, nearest
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

MOVES = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 150 / 331, "translate_y": 150 / 331, "rotate": 30.0}
"""How far the geometric operations go at most: a slope, a share of the image's side, degrees."""
COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Images `(n c h w)` and strengths `(n,)`, those up to solarize drawn with either sign.
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

    Their strength is `magnitude`/(`num_magnitude_bins` − 1) of the strongest; shears, translations, rotations, brightness,
    colour, contrast and sharpness go either way. Neighbouring geometric operations are sampled once. Pixels beyond the
    edge are black. Images of one channel have no colour to change.

    Operations, ranges and defaults are those of torchvision's RandAugment; it reads the nearest pixel where this
    interpolates, and its posterize of bytes rounds otherwise than that of floats, which is this one.

    Raises `UsageError` for an unknown operation, none at all, a negative `num_ops` and a magnitude outside its bins.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    operations: Sequence[str] = OPERATIONS

    def __post_init__(self) -> None:
        if self.num_ops < 0:
            raise UsageError(f"num_ops is {self.num_ops}; expected at least 0 operations an image")
        if not 0 <= self.magnitude < self.num_magnitude_bins or self.num_magnitude_bins < 2:
            raise UsageError(
                f"magnitude is {self.magnitude} with {self.num_magnitude_bins} bins; expected at least 2 bins and a "
                f"magnitude from 0 to one less than there are"
            )
        for name in self.operations:
            if name not in OPERATIONS:
                raise UsageError(f"no operation named {name!r}{nearest(name, OPERATIONS)}; known: {', '.join(OPERATIONS)}")
        if not self.operations:
            raise UsageError(f"operations is empty; expected some of {', '.join(OPERATIONS)}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        shape = (self.num_ops, len(images))
        known = torch.tensor([OPERATIONS.index(name) for name in self.operations], device=images.device)
        chosen = known[torch.randint(len(known), shape, device=images.device, generator=generator)]
        sign = 1 - 2 * torch.randint(2, shape, device=images.device, generator=generator)
        strength = sign * (self.magnitude / (self.num_magnitude_bins - 1))
        return apply(images, chosen, strength)


def apply(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """The operations numbered `chosen` in `OPERATIONS`, with `strength` in [−1, 1]: both `(r n)`, r rounds of one an image."""
    first_colour = 1 + len(MOVES)
    still = torch.eye(3, device=images.device)
    moves = still.expand(len(images), 3, 3)
    moved = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    places = torch.arange(len(images), device=images.device)  # where each image lies
    steps = _matrices(images, chosen.flatten(), strength.flatten()).view(*chosen.shape, 3, 3)
    for operation, level, step in zip(chosen, strength, steps, strict=True):
        # Images of one operation are brought together and changed in place, which takes half the time of picking them.
        order = operation.argsort(stable=True)
        images = images.index_select(0, places.index_select(0, order))
        places = order.argsort()
        counts = torch.bincount(operation, minlength=len(OPERATIONS)).tolist()
        # What an image has been moved by is sampled before its colours change, and before the end.
        colour = operation >= first_colour
        _sample(images, places, moves, moved & colour)
        moves = torch.where(colour[:, None, None], still, chain(moves, step))
        moved = ~colour & (moved | (operation > 0))
        groups, levels = (whole.split(counts)[first_colour:] for whole in (images, level.index_select(0, order)))
        for change, group, own in zip(COLOURS.values(), groups, levels, strict=True):
            if len(group):
                group.copy_(change(group, own))
    _sample(images, places, moves, moved)
    return images.index_select(0, places)


def _sample(images: Tensor, places: Tensor, matrices: Tensor, which: Tensor) -> None:
    """Sample those images, in place, for which `which` `(n,)` is true; the i-th lies at `places[i]`."""
    group = which.nonzero()[:, 0]
    if len(group):
        place = places.index_select(0, group)
        images.index_copy_(0, place, sample(images.index_select(0, place), matrices.index_select(0, group)))


def _matrices(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """`(n 3 3)`: what each geometric operation does to coordinates, nothing where it is another one.

    Shears keep the upper and the left edge, and translations are by whole pixels, as torchvision's.
    """
    height, width = images.shape[2:]
    reach = torch.tensor(list(MOVES.values()), device=images.device)[:, None]
    numbers = torch.arange(1, 1 + len(MOVES), device=images.device)[:, None]
    slope_x, slope_y, right, down, angle = (operation == numbers) * reach * strength
    slope_x, slope_y = slope_x * (height / width), slope_y * (width / height)
    x, y = ((share * side).trunc() * (2 / side) for share, side in ((right, width), (down, height)))
    cos, sin = (angle * (math.pi / 180)).cos(), (angle * (math.pi / 180)).sin()
    # Each image is moved in one way alone: in the sums every term but one is nothing.
    return matrices_of(
        cos, slope_x - sin * (height / width), slope_x - x,
        slope_y + sin * (width / height), cos, slope_y - y,
    )  # fmt: skip


__all__ = ["COLOURS", "MOVES", "OPERATIONS", "RandAugment", "apply"]
