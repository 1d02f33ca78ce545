"""Charts, read back from their pixels."""

import numpy as np
import pytest
from sparse_forcing_pack.sparse_attn.charts import COLOURS, TEXT, bar_chart, line_chart, ticks


def count(picture, colour):
    return int((np.asarray(picture) == colour).all(-1).sum())


def test_bars_are_as_long_as_their_parts():
    bars = {"one": [("a", 1.0), ("b", 3.0)], "two": [("b", 2.0), ("a", 1.0)]}
    picture = bar_chart("title", bars, str)
    a, b = (count(picture, colour) for colour in COLOURS[:2])
    swatch = 13 * 11
    assert (b - swatch) / (a - swatch) == pytest.approx((3 + 2) / (1 + 1), rel=0.02)


def test_the_limit_is_drawn_where_it_is():
    def line_at(limit):
        pixels = np.asarray(bar_chart("", {"one": [("a", 4.0)]}, lambda _: "", ("", limit)))
        (columns,) = np.nonzero((pixels[32:64] == TEXT).all(-1).sum(0) > 25)
        return columns

    (half,), (whole,), (double,) = line_at(2.0), line_at(4.0), line_at(8.0)
    bar = np.asarray(bar_chart("", {"one": [("a", 4.0)]}, lambda _: ""))[45]
    first, last = np.nonzero((bar == COLOURS[0]).all(-1))[0][[0, -1]]
    assert abs(whole - last) <= 1 and abs(half - (first + last) / 2) <= 1
    assert double == whole  # the longest of all reaches the end


def test_lines_go_where_their_values_are():
    pixels = np.asarray(line_chart("", {"flat": [10.0] * 4, "rising": [1.0, 4.0, 7.0, 10.0]}, "x", "y"))
    plot = pixels[: 2 * 18 + 6 + 240]
    for colour, start in zip(COLOURS, (10.0, 1.0)):
        rows, columns = np.nonzero((plot == colour).all(-1))
        height = 2 * 18 + 6 + 240 - rows[columns == columns.min()].mean()
        assert height == pytest.approx(24 * start, abs=4)


def test_nothing_to_draw_is_drawn():
    assert line_chart("", {}, "x", "y").size == line_chart("", {"a": [0.0]}, "x", "y").size
    assert bar_chart("", {"none": []}, str).width == 720


@pytest.mark.parametrize("highest", [0.0123, 0.9, 1.0, 7.0, 49.9, 1234.0])
def test_ticks_are_round_and_few(highest):
    found = ticks(highest)
    assert found[0] == 0 and found[-1] <= highest and 2 <= len(found) <= 6
    assert all(len(f"{tick:g}".strip("0.").replace(".", "")) <= 3 for tick in found)
