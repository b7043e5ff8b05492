"""Folders of images that stand for photographs: of mixed sizes, of different scenes, without labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((96, 64), (64, 96), (80, 80), (120, 68), (40, 52))
"""Width and height in pixels, landscape and portrait."""


def write_photographs(folder: Path, count: int) -> Path:
    """Write `count` PNG files, a sky, a ground and a disc in random colours each, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        y, x = np.mgrid[:height, :width]
        sky, ground, disc = random.integers(0, 256, (3, 3))
        pixels = np.where((y < height * random.uniform(0.3, 0.7))[..., None], sky, ground).astype(float)
        centre_x, centre_y = random.uniform(0.2, 0.8, 2) * (width, height)
        pixels[np.hypot(x - centre_x, y - centre_y) < random.uniform(0.1, 0.3) * min(width, height)] = disc
        pixels += random.normal(0, 6, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"photograph_{number:04}.png")
    return folder


def write_objects(folder: Path, objects: np.ndarray, labels: Sequence[str] | None = None, *, seed: int = 0) -> Path:
    """Write a JPEG for each object uint8 `(n c h w)`, enlarged, somewhere on a cluttered ground, and return the folder.

    With `labels` each lies in the folder of its label. Sizes are mixed; an object takes a half to nine tenths of the shorter side.
    """
    random = np.random.default_rng(seed)
    for number, pixels in enumerate(objects):
        width, height = SIZES[number % len(SIZES)]
        spots = random.integers(30, 226, 3) + random.normal(0, 25, (6, 8, 3))
        ground = Image.fromarray(spots.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        side = int(min(width, height) * random.uniform(0.5, 0.9))
        one = Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]).convert("RGB").resize((side, side))
        ground.paste(one, (int(random.integers(0, width - side + 1)), int(random.integers(0, height - side + 1))))
        target = folder if labels is None else folder / labels[number]
        target.mkdir(parents=True, exist_ok=True)
        ground.save(target / f"img_{number:04}.jpg", quality=90)
    return folder
