"""Figures of shares with their intervals, and sheets of attention."""

import numpy as np
import pytest

from vitkit.contracts import Proportions
from vitkit.intervals import wilson
from vitkit.report import AttendedPicture, attention_sheet
from vitkit.report.figures import draw_figure
from vitkit.report.sheet import sheet_pixels


def test_a_bar_for_each_name_with_its_interval_the_lowest_first():
    plot = draw_figure("class_accuracy", Proportions(["cat", "dog", "elk"], np.array([19, 6, 0]), np.array([20, 12, 0])))
    (axis,) = plot.figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["dog", "cat", "elk"]
    assert [bar.get_width() for bar in axis.patches] == [0.5, 0.95]
    lines = [tuple(line.get_xdata()) for line in axis.lines]
    assert {wilson(6, 12), wilson(19, 20)} <= set(lines)
    assert [text.get_text() for text in axis.texts] == ["6 of 12", "19 of 20", "no image"]
    assert plot.caption.startswith("All: 25 of 32 (78.1%), the broken line.")
    assert plot.alt == "Bars of 3 shares: dog: 6 of 12; cat: 19 of 20; elk: 0 of 0."


def test_of_many_names_the_lowest_are_drawn():
    plot = draw_figure("classes", Proportions([f"c{i}" for i in range(100)], np.arange(100), np.full(100, 100)))
    assert plot.caption.endswith("The 40 lowest of 100 are shown.")


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"hits and totals are \(k,\) for k names; got \(2,\), \(2,\) and 3 names"):
        draw_figure("classes", Proportions(["a", "b", "c"], np.zeros(2), np.zeros(2)))


def picture(maps, side=32):
    image = np.full((3, side, side), 0.5, dtype=np.float32)
    return AttendedPicture("a.png", image, np.zeros((4, 4, 3)), maps)


def test_a_sheet_has_the_picture_its_tokens_and_a_map_each():
    peaked = np.full((4, 4), 0.01)
    peaked[1, 2] = 0.85
    sheet = attention_sheet([picture({"last block": peaked, "rollout": np.full((4, 4), 1 / 16)})])
    assert sheet.captions == ["a.png", "tokens (PCA)", "last block\n13.6× mean", "rollout\n1.0× mean"]
    assert (len(sheet.images), sheet.columns) == (4, 4)
    luminance = sheet.images[2].mean(0)
    assert np.unravel_index(luminance.argmax(), (32, 32))[0] // 8 == 1
    assert np.unravel_index(luminance.argmax(), (32, 32))[1] // 8 == 2
    assert np.ptp(sheet.images[3]) < 0.5  # an even map is one colour, and not the brightest
    assert sheet.images[3].mean() < luminance.max() / 1.5
    assert sheet_pixels(sheet).dtype == np.uint8


def test_many_heads_take_several_rows():
    heads = {f"head {number}": np.ones((2, 2)) for number in range(1, 13)}
    sheet = attention_sheet([picture(heads), picture(heads)])
    assert sheet.columns == 10
    assert len(sheet.images) == 40
    assert sheet.captions[14:20] == [""] * 6
    assert sheet.captions[20] == "a.png"


def test_grey_pictures_become_colour_and_none_is_an_error():
    assert attention_sheet([AttendedPicture("a", np.zeros((1, 8, 8)), np.zeros((2, 2, 3)))]).images.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="a sheet of attention needs at least one picture"):
        attention_sheet([])
