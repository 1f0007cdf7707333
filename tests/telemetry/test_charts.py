"""Charts as SVG: round numbers at the axes, lines that break where a value is missing, bounded in size."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.telemetry.charts import (
    MOST_LINES,
    MOST_POINTS,
    Chart,
    Line,
    decades,
    figure,
    labelled,
    text_of,
    thinned,
    ticks,
)

STEPS = [1.0, 2.0, 3.0, 4.0]


def svg(chart: Chart) -> ElementTree.Element:
    """The picture, parsed."""
    found = re.search("<svg.*</svg>", figure(chart))
    assert found, figure(chart)
    return ElementTree.fromstring(found[0])


def paths(chart: Chart, kind: str) -> list[str]:
    return [part.attrib["d"] for part in svg(chart).iter("path") if kind in part.attrib["class"].split()]


def test_ticks_are_round_numbers_within_the_axis() -> None:
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert ticks(-0.7, 3.3) == [0, 1, 2, 3] and ticks(0.93, 0.97) == pytest.approx([0.93, 0.94, 0.95, 0.96, 0.97])
    assert decades(2e-7, 3e-3) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3]) and decades(2, 3) == [2, 3]
    assert [text_of(value) for value in (0, 0.25, 1234.0, 1e-6)] == ["0", "0.25", "1.23e3", "1e-6"]


def test_ticks_that_are_close_have_different_texts() -> None:
    close = [1000.0, 1000.0002, 1000.0004]
    assert labelled(close) == [(1000.0, "1000"), (1000.0002, "1000.0002"), (1000.0004, "1000.0004")]
    assert [text for _, text in labelled([0.0, 0.5])] == ["0", "0.5"]


def test_a_line_is_broken_where_a_value_is_not_finite() -> None:
    (line,) = paths(Chart("a", [Line("", STEPS, [1.0, math.nan, 2.0, 3.0])]), "line")
    assert line.count("M") == 2 and line.count("L") == 1
    assert len(list(svg(Chart("a", [Line("", STEPS, [1.0, math.inf, 2.0, 3.0])])).iter("circle"))) == 3


def test_a_higher_value_stands_higher_also_on_a_logarithmic_axis() -> None:
    for log in (False, True):
        (line,) = paths(Chart("a", [Line("", STEPS, [1.0, 2.0, 4.0, 8.0])], log=log), "line")
        heights = [float(place.split()[1]) for place in re.split("[ML]", line) if place]
        assert heights == sorted(heights, reverse=True) and len(set(heights)) == 4
        steps = [a - b for a, b in pairwise(heights)]
        assert (max(steps) - min(steps) < 0.3) == log, "equal ratios are equal distances there alone"


def test_intervals_are_bars_and_a_guide_has_no_marks() -> None:
    line, guide = Line("a", STEPS, STEPS, [0.5] * 4, [4.5] * 4), Line("b", [1.0, 4.0], [1.0, 4.0], dashed=True)
    chart = Chart("a", [line, guide])
    assert len(paths(chart, "bar")) == len(list(svg(chart).iter("circle"))) == 4 and len(paths(chart, "dashed")) == 1


def test_a_long_line_is_drawn_as_means_of_neighbours() -> None:
    long = thinned(Line("a", [*map(float, range(10_000))], [1.0, 3.0] * 5_000))
    assert len(long.x) == MOST_POINTS and set(long.y) == {2.0} and long.x[0] == 24.5
    assert thinned(Line("a", STEPS, [math.nan, 1.0, math.nan, math.nan]), 2).y[0] == 1.0
    many = figure(
        Chart("a", [Line(str(i), [*map(float, range(5_000))], [*map(float, range(5_000))]) for i in range(99)])
    )
    assert len(many) < 60_000 and f"and {99 - MOST_LINES} more" in many


@pytest.mark.parametrize("lines", [[], [Line("a", [], [])], [Line("a", [1.0], [math.nan])]])
def test_nothing_to_draw_is_said(lines: list[Line]) -> None:
    assert "Nothing that could be drawn" in figure(Chart("a", lines)) and "<svg" not in figure(Chart("a", lines))
    assert "Nothing that could be drawn" in figure(Chart("a", [Line("a", [1.0], [-1.0])], log=True))


def test_titles_and_labels_are_shown_as_text() -> None:
    found = figure(Chart("<b>", [Line("<i>", STEPS, STEPS), Line("&", STEPS, STEPS)], '"x"', "<y>"))
    assert not {"<i>", "<y>"} & {*re.findall("<[a-z]+>", found)} and "&lt;b&gt;" in found and "&lt;i&gt;" in found


@given(st.lists(st.floats(width=64), min_size=1, max_size=30), st.booleans())
def test_any_numbers_come_to_a_picture_with_finite_places_within_it(values: list[float], log: bool) -> None:
    chart = Chart("a", [Line("a", [*map(float, range(len(values)))], values), Line("b", values, values)], log=log)
    if "<svg" in figure(chart):
        for path in paths(chart, "line"):
            for number in re.findall(r"[^ ML]+", path):
                assert -1 <= float(number) <= 341, (number, values)
