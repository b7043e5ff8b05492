from typing import Any

import pytest
import torch

from vitkit import heads
from vitkit.errors import UsageError
from vitkit_vae import ConvDecoder


def decoder(**kwargs: Any) -> ConvDecoder:
    torch.manual_seed(0)
    return ConvDecoder(**{"in_dim": 6, "out_dim": 1, **kwargs})


@pytest.mark.parametrize("kernel_size", [2, 3, 4])
@pytest.mark.parametrize(("img_size", "grid"), [(32, (4, 4)), (28, (4, 4)), (8, (1, 1)), (13, (2, 2)), ((20, 48), (3, 6))])
def test_images_of_every_size(img_size: Any, grid: tuple[int, int], kernel_size: int) -> None:
    model = heads.build("conv_decoder", in_dim=6, out_dim=3, img_size=img_size, kernel_size=kernel_size)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    images = model(10 * torch.randn(2, 6))
    assert images.shape == (2, 3, height, width)
    assert model.grid == grid
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(model.logits(torch.ones(1, 6)).sigmoid(), model(torch.ones(1, 6)))


def test_the_stages_are_those_of_the_seed_document() -> None:
    model, sizes = decoder(in_dim=64, out_dim=3), []
    for conv in model.convs:
        conv.register_forward_hook(lambda _, given, made: sizes.append((tuple(given[0].shape[1:]), tuple(made.shape[1:]))))
    model(torch.zeros(1, 64))
    assert sizes == [((256, 4, 4), (128, 8, 8)), ((128, 8, 8), (64, 16, 16)), ((64, 16, 16), (3, 32, 32))]


def test_28_pixels_are_the_middle_of_32() -> None:
    large, small, z = decoder(), decoder(img_size=28), torch.randn(2, 6)
    torch.testing.assert_close(small(z), large(z)[:, :, 2:30, 2:30])


def test_a_class_moves_the_image_and_no_class_does_not() -> None:
    model, z = decoder(num_classes=3), torch.randn(2, 6)
    torch.nn.init.normal_(model.label_embed.weight)
    without = model(z)
    torch.testing.assert_close(model(z, torch.tensor([-1, -1])), without)
    assert not torch.allclose(model(z, torch.tensor([0, 1])), without, atol=1e-3)
    assert not torch.allclose(model(z, torch.tensor([0, 1])), model(z, torch.tensor([2, 1])), atol=1e-3)
    torch.testing.assert_close(model(z, torch.tensor([2, 1]))[1], model(z, torch.tensor([0, 1]))[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoder(in_dim=0), "in_dim is 0; expected at least 1"),
        (lambda: decoder(num_classes=0), "num_classes is 0; expected at least 1"),
        (lambda: decoder(img_size=(8, 0)), r"img_size is \(8, 0\); expected a number of pixels or \(height, width\)"),
        (lambda: decoder(kernel_size=5), "kernel_size is 5; expected 2, 3, 4"),
        (lambda: decoder()(torch.zeros(2, 5)), r"latents are \(2, 5\); expected \(batch, 6\)"),
        (lambda: decoder()(torch.zeros(2, 6), torch.tensor([0, 1])), "a decoder without classes; build it with num_classes"),
        (
            lambda: decoder(num_classes=2)(torch.zeros(2, 6), torch.tensor([0, 2])),
            "label 2 is not one of this decoder's 2 classes, 0 … 1",
        ),
        (
            lambda: decoder(num_classes=2)(torch.zeros(2, 6), torch.tensor([0.0, 1.0])),
            r"labels are torch.float32 \(2,\); expected int64 \(2,\)",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
