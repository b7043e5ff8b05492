"""MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100 and digits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitkit.data import ImageDataset, Stored, fetched, from_store
from vitkit_data.download import download


def mnist(*, img_size: int | None = None, val_size: int | None = None) -> ImageDataset:
    """Handwritten digits: 60,000 + 10,000 grey images of 28×28 pixels in 10 classes of about 7,000 each.

    A larger `img_size` surrounds the image with black, as LeNet did to get 32×32; a smaller one resizes it. 5,000 of the training
    images are for validation, or `val_size`. Raises `DatasetError` if it is neither in the store nor can be downloaded.
    """
    return from_store(
        fetched("mnist", _mnist),
        img_size=img_size,
        val_size=val_size,
        fit="pad",
        source="Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits, 1998",
        licence="CC BY-SA 3.0",
        hub_id="ylecun/mnist",
        moments=((0.1307,), (0.3081,)),
    )


def fashion_mnist(*, img_size: int | None = None, val_size: int | None = None) -> ImageDataset:
    """Clothing: 60,000 + 10,000 grey images of 28×28 pixels in 10 classes of 7,000 each.

    A larger `img_size` surrounds the image with black; a smaller one resizes it. 5,000 of the training images are for validation,
    or `val_size`. Raises `DatasetError` if it is neither in the store nor can be downloaded.
    """
    return from_store(
        fetched("fashion_mnist", partial(download, "FashionMNIST")),
        img_size=img_size,
        val_size=val_size,
        fit="pad",
        source="H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST, arXiv 1708.07747, 2017",
        licence="MIT",
        hub_id="zalando-datasets/fashion_mnist",
        moments=((0.2860,), (0.3530,)),
    )


def cifar10(*, img_size: int | None = None, val_size: int | None = None) -> ImageDataset:
    """Tiny photographs: 50,000 + 10,000 colour images of 32×32 pixels in 10 classes of 6,000 each.

    Another `img_size` resizes it. 5,000 of the training images are for validation, or `val_size`. Raises `DatasetError` if it is
    neither in the store nor can be downloaded.
    """
    return from_store(
        fetched("cifar10", partial(download, "CIFAR10")),
        img_size=img_size,
        val_size=val_size,
        source="A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009",
        licence="unstated; for research",
        hub_id="uoft-cs/cifar10",
        moments=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    )


def cifar100(*, img_size: int | None = None, val_size: int | None = None) -> ImageDataset:
    """Tiny photographs: 50,000 + 10,000 colour images of 32×32 pixels in 100 classes of 600 each.

    Another `img_size` resizes it. 5,000 of the training images are for validation, or `val_size`. Raises `DatasetError` if it is
    neither in the store nor can be downloaded.
    """
    return from_store(
        fetched("cifar100", partial(download, "CIFAR100")),
        img_size=img_size,
        val_size=val_size,
        source="A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009",
        licence="unstated; for research",
        hub_id="uoft-cs/cifar100",
        moments=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    )


WRITERS = (1287, 1415)
"""First images of the validation and the test split of digits: blocks 11 and 12 of 14, about one writer each."""


def digits(*, img_size: int | None = None) -> ImageDataset:
    """Small handwritten digits from scikit-learn: 1,797 grey images of 8×8 pixels, always available.

    The images stand in blocks of about 130 from one writer each, which the order of their labels shows. The first 10 blocks are for
    training (1,287 images), the next for validation (128), the last 3 for testing (382), so that no writer is in two splits. The set
    names no writers, so this is as far as that can be ensured. Another `img_size` resizes the images, antialiased.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    tensors = {
        f"{split}.{name}": part
        for name, values in (("images", images), ("labels", labels))
        for split, part in zip(("train", "val", "test"), values.tensor_split(WRITERS), strict=True)
    }
    return from_store(
        Stored("digits", [str(digit) for digit in range(10)], tensors),
        img_size=img_size,
        source=(
            "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998 (scikit-learn's load_digits), "
            "split by writers"
        ),
        licence="CC BY 4.0",
        val_note="128 images, a block of one writer who is not in the training images",
    )


def _mnist() -> tuple[dict[str, Tensor], list[str]]:
    tensors, _ = download("MNIST")
    return tensors, [str(digit) for digit in range(10)]  # torchvision calls them "0 - zero" and so on
