"""Folders of images that stand for photographs: of mixed sizes, of different scenes, without labels."""

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
