"""A person's pictures become what the model was trained on."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit.data.preprocess import Preprocessing, preprocess
from vitkit.errors import UsageError

GREY = Preprocessing((1, 8, 8), (0.5,), (0.25,), "pad")
COLOUR = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "resize")


def picture(width=8, height=8, mode="RGB", seed=0):
    shape = {"L": (height, width), "RGB": (height, width, 3), "RGBA": (height, width, 4)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_pillow_images_and_the_tensor_of_their_pixels_give_the_same():
    for preprocessing, mode, size in ((COLOUR, "RGB", 8), (COLOUR, "RGB", 20), (COLOUR, "RGB", 5), (GREY, "L", 6)):
        pictures = [picture(size, size, mode, seed) for seed in range(3)]
        arrays = np.stack([np.asarray(one).reshape(size, size, -1) for one in pictures])
        tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
        torch.testing.assert_close(preprocess(pictures, preprocessing), preprocess(tensor, preprocessing))


def test_a_tensor_is_scaled_sized_and_normalised():
    images = torch.randint(0, 256, (2, 1, 6, 6), dtype=torch.uint8)
    found = preprocess(images, GREY)
    torch.testing.assert_close(found[:, :, 1:7, 1:7], (images / 255 - 0.5) / 0.25)
    assert (found[:, :, 0] == -2.0).all()  # black, normalised


def test_pictures_of_any_size_and_mode_become_one_batch():
    pictures = [picture(30, 12), picture(5, 9, "L"), picture(8, 8, "RGBA"), picture(9, 9).convert("P")]
    assert preprocess(pictures, COLOUR).shape == (4, 3, 8, 8)
    assert preprocess(pictures, GREY).shape == (4, 1, 8, 8)


def test_a_wide_picture_is_cropped_about_its_middle_rather_than_squeezed():
    middle = picture(8, 8)
    wide = Image.new("RGB", (24, 8), "red")
    wide.paste(middle, (8, 0))
    torch.testing.assert_close(preprocess([wide], COLOUR), preprocess([middle], COLOUR))
    flat = Preprocessing((3, 4, 12), (0.5,) * 3, (0.5,) * 3, "resize")
    assert preprocess([picture(12, 12)], flat).shape == (1, 3, 4, 12)


def test_transparency_is_white_sixteen_bits_keep_their_shades_and_exif_turns_upright():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    torch.testing.assert_close(preprocess([clear], COLOUR), preprocess([Image.new("RGB", (8, 8), "white")], COLOUR))
    deep = Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))
    expected = torch.from_numpy((np.arange(64).reshape(1, 1, 8, 8) * 1000 // 257).astype(np.uint8))
    torch.testing.assert_close(preprocess([deep], GREY), preprocess(expected, GREY))
    upright = picture()
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned clockwise
    torch.testing.assert_close(preprocess([turned], COLOUR), preprocess([upright], COLOUR))


def test_tensors_become_grey_or_coloured_as_the_model_has_it():
    one = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    torch.testing.assert_close(preprocess(one, COLOUR), preprocess(one.expand(1, 3, 8, 8), COLOUR))
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    luma = torch.full((1, 1, 8, 8), round(0.299 * 200), dtype=torch.uint8)
    torch.testing.assert_close(preprocess(red, GREY), preprocess(luma, GREY))


@pytest.mark.parametrize(
    ("images", "preprocessing", "message"),
    [
        (torch.zeros(2, 3, 8, 8), COLOUR, r"images are torch.float32 \(2, 3, 8, 8\); expected uint8 \(n, 3, h, w\)"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), COLOUR, r"expected uint8 \(n, 3, h, w\)"),
        (picture(), COLOUR, "expected a uint8 tensor or a list of Pillow images"),
        ([], COLOUR, r"images are \[\]; expected a uint8 tensor or a list"),
        (["cat.png"], COLOUR, r"images are \['cat.png'\]; expected"),
        ([picture()], Preprocessing((2, 8, 8), (0.0, 0.0), (1.0, 1.0)), "takes 2 channels, which no Pillow image has"),
    ],
)
def test_images_of_another_kind_are_refused(images, preprocessing, message):
    with pytest.raises(UsageError, match=message):
        preprocess(images, preprocessing)
