"""Two large and six small views of each image: vitkit's batched crops beside torchvision image by image and, if installed, kornia.

    python tests/benchmarks/views.py [--stored 64] [--images 128] [--threads 1] [--repeats 5]

Every contender crops, flips and resizes stored uint8 images with parameters drawn for each view: 2 views of half the stored side from 40 %
to 100 % of the area, and 6 of a quarter of it from 5 % to 40 %. It prints the median of views per second of processor time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torchvision.transforms import v2

from vitkit.data import ImageSplit, Preprocessing, View
from vitkit.transforms import Compose, HorizontalFlip, RandomResizedCrop

LARGE, SMALL = (0.4, 1.0), (0.05, 0.4)


def vitkit_views(images: torch.Tensor) -> Callable[[], object]:
    count, channels, side = images.shape[:3]
    split = ImageSplit(images, torch.zeros(count, dtype=torch.int64), Preprocessing((channels, side, side), (0.5,) * 3, (0.25,) * 3))
    views = [
        View(side // 2, 2, Compose([RandomResizedCrop(scale=LARGE), HorizontalFlip()])),
        View(side // 4, 6, Compose([RandomResizedCrop(scale=SMALL), HorizontalFlip()])),
    ]
    batches = split.batches(count, shuffle=True, views=views)
    return lambda: next(batches.epoch(0))


def torchvision_views(images: torch.Tensor) -> Callable[[], object]:
    side = images.shape[2]

    def transform(size: int, scale: tuple[float, float]) -> v2.Compose:
        crop = v2.RandomResizedCrop(size, scale=scale, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])

    large, small = transform(side // 2, LARGE), transform(side // 4, SMALL)
    return lambda: [torch.stack([change(image) for image in images for _ in range(n)]) for change, n in ((large, 2), (small, 6))]


def kornia_views(images: torch.Tensor) -> Callable[[], object]:
    import kornia.augmentation as K

    side = images.shape[2]

    def transform(size: int, scale: tuple[float, float]) -> torch.nn.Module:
        flip = K.RandomHorizontalFlip()
        return torch.nn.Sequential(K.RandomResizedCrop((size, size), scale=scale), flip, K.Normalize([0.5] * 3, [0.25] * 3))

    large, small = transform(side // 2, LARGE), transform(side // 4, SMALL)
    return lambda: [change((images / 255).repeat_interleave(n, 0)) for change, n in ((large, 2), (small, 6))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("stored", 64), ("images", 128), ("threads", 1), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randint(0, 256, (options.images, 3, options.stored, options.stored), dtype=torch.uint8)
    for contender in (vitkit_views, torchvision_views, kornia_views):
        name = contender.__name__.removesuffix("_views")
        try:
            work = contender(images)
        except ImportError:
            print(f"{name:12} not installed")
            continue
        work()
        rates = []
        for _ in range(options.repeats):
            began = time.process_time()
            work()
            rates.append(8 * options.images / (time.process_time() - began))
        print(f"{name:12} {statistics.median(rates):10,.0f} views/s")


if __name__ == "__main__":
    main()
