"""Sheets of images: pixel by pixel what was given, in files and in reports alike."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit.contracts import Sheet
from vitkit.errors import RunError
from vitkit.report import write_report, write_sheet
from vitkit.report.sheet import CAPTION_LINES, GAP, LINE, MAX_IMAGES, SIDE, sheet, sheet_pixels
from vitkit.report.style import house_style, png


def cut(pixels, place, columns, height, width, below=0):
    """The pixels of one image of a sheet, caption excluded."""
    row, column = divmod(place, columns)
    top, left = GAP + row * (height + below + GAP), GAP + column * (width + GAP)
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize(("size", "scale"), [((28, 28), 5), ((32, 32), 4), ((3, 7), 19), ((200, 150), 1)])
def test_every_pixel_becomes_a_square_of_its_colour(size, scale):
    images = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    pixels = sheet_pixels(Sheet(images, [], columns=3))
    height, width = size[0] * scale, size[1] * scale
    assert max(height, width) >= SIDE
    assert pixels.shape == (2 * (height + GAP) + GAP, 3 * (width + GAP) + GAP, 3)
    for place, image in enumerate(images):
        square = cut(pixels, place, 3, height, width)
        expected = np.kron((image * 255).round().byte().numpy(), np.ones((1, scale, scale), np.uint8))
        np.testing.assert_array_equal(square, expected.transpose(1, 2, 0))
    assert (cut(pixels, 5, 3, height, width) == 255).all()
    assert (pixels[:GAP] == 255).all()


def test_a_report_shows_the_same_pixels_as_a_file(tmp_path, make_run):
    picture = Sheet(torch.rand(7, 1, 9, 9), [f"label {i}" for i in range(7)], columns=4)
    write_sheet(tmp_path / "new" / "grid.png", picture)
    with Image.open(tmp_path / "new" / "grid.png") as file:
        written = np.asarray(file.convert("RGB"))
    np.testing.assert_array_equal(written, sheet_pixels(picture))
    with house_style():
        plot = sheet("samples", picture)
        drawn = np.asarray(Image.open(io.BytesIO(png(plot.figure))).convert("RGB"))
    np.testing.assert_array_equal(drawn, written)
    assert plot.alt == "7 images: label 0, label 1, label 2, label 3, label 4, label 5, label 6."
    directory = make_run()
    write_report(directory, {"samples": picture})
    with Image.open(directory / "plots" / "samples.png") as file:
        np.testing.assert_array_equal(np.asarray(file.convert("RGB")), written)


def test_channels_are_grey_or_colours_and_odd_values_are_cut():
    values = torch.tensor([0.5, float("nan"), -1.0, float("inf")]).view(4, 1, 1, 1)
    assert sheet_pixels(Sheet(values, [], 4))[GAP, GAP :: SIDE + GAP][:4, 0].tolist() == [128, 0, 0, 255]
    images = torch.tensor([0.2, 0.4, 0.6, 0.9]).view(1, 4, 1, 1)
    for channels, expected in ((1, [51, 51, 51]), (2, [76, 76, 76]), (3, [51, 102, 153]), (4, [51, 102, 153])):
        assert sheet_pixels(Sheet(images[:, :channels], []))[GAP, GAP].tolist() == expected
    np.testing.assert_array_equal(
        sheet_pixels(Sheet(images.bfloat16(), [])), sheet_pixels(Sheet(images.bfloat16().float().numpy(), []))
    )


def test_captions_stand_under_their_images_and_rows_make_room_for_the_longest():
    images = torch.zeros(4, 1, 32, 32)
    bare = sheet_pixels(Sheet(images, [], columns=2))
    short = sheet_pixels(Sheet(images, ["a", "b", "c", "d"], columns=2))
    long = sheet_pixels(Sheet(images, ["a", "two words that do not fit on one line", "c", "x" * 500], columns=2))
    assert [len(pixels) for pixels in (bare, short, long)] == [280, 280 + 2 * LINE, 280 + (3 + CAPTION_LINES) * LINE]
    below = short[GAP + 128 : GAP + 128 + LINE]
    assert (below[:, GAP : GAP + 128] < 100).any()  # a letter in the middle
    assert (below[:, :60] == 255).all()
    assert (long[:, [*range(GAP), *range(GAP + 128, 2 * GAP + 128)]] == 255).all()  # nothing runs into the gaps
    broken = sheet_pixels(Sheet(images, ["猫 $x_1$\nsecond line", "", " ", "_d"], columns=2))
    assert len(broken) == 280 + 3 * LINE


def test_a_report_shows_so_many_and_says_so():
    picture = Sheet(torch.zeros(MAX_IMAGES + 1, 1, 128, 128), [], columns=32)
    plot = sheet("many", picture)
    assert plot.caption == f"{MAX_IMAGES} of {MAX_IMAGES + 1} images are shown."
    assert plot.figure.get_size_inches()[1] * 150 == 4 * (128 + GAP) + GAP


@pytest.mark.parametrize(
    ("picture", "got"),
    [
        (Sheet(torch.zeros(2, 3, 4), []), r"\(2, 3, 4\), 0 captions and 8 columns"),
        (Sheet(torch.zeros(0, 1, 4, 4), []), r"\(0, 1, 4, 4\), 0 captions and 8 columns"),
        (Sheet(torch.zeros(2, 1, 4, 4), ["a"]), r"\(2, 1, 4, 4\), 1 captions and 8 columns"),
        (Sheet(torch.zeros(2, 1, 4, 4), [], 0), r"\(2, 1, 4, 4\), 0 captions and 0 columns"),
    ],
)
def test_what_does_not_fit_together_is_refused(picture, got, tmp_path):
    with pytest.raises(ValueError, match=rf"images are \(n, c, h, w\), captions n texts or none, .*; got {got}"):
        write_sheet(tmp_path / "grid.png", picture)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(tmp_path):
    picture = Sheet(torch.zeros(1, 1, 4, 4), [])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*grid.png: "):
        write_sheet(tmp_path / "file" / "grid.png", picture)
    with pytest.raises(RunError, match="cannot write .*: Is a directory"):
        write_sheet(tmp_path, picture)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_drawing_imports_no_torch():
    program = "import sys, vitkit.report; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
