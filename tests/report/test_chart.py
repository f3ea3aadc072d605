"""Charts: every point is within the axes, and the axes are of round numbers."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from emloc_core.report.chart import Line, _ticks, chart

NUMBERS = st.floats(-1e6, 1e6).map(lambda value: round(value, 4))


@given(NUMBERS, NUMBERS)
def test_ticks_span_what_is_drawn_at_a_few_even_gaps(first, second):
    low, high = sorted((first, second))
    ticks = _ticks(low, high)
    room = 1e-6 * max(1, abs(low), abs(high))
    assert ticks[0] <= low + room
    assert ticks[-1] >= high - room
    assert 2 <= len(ticks) <= 7
    gaps = [after - before for before, after in pairwise(ticks)]
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-6, abs_tol=room) for gap in gaps)


@given(st.integers(0, 10**5), st.integers(0, 10**5))
def test_ticks_of_steps_are_whole(first, second):
    low, high = sorted((first, second))
    assert all(tick == int(tick) for tick in _ticks(low, high, whole=True))


@given(st.lists(st.tuples(st.integers(0, 1000), NUMBERS), min_size=1, max_size=20))
def test_every_point_is_inside(points):
    drawn = ElementTree.fromstring(str(chart([Line("a", points, marked=True)], "step", "loss")))
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    circles = drawn.findall("circle")
    assert len(circles) == len(points)
    assert all(0 < float(circle.attrib["cx"]) < width and 0 < float(circle.attrib["cy"]) < height for circle in circles)


def test_names_are_escaped_and_several_lines_have_a_legend():
    text = chart([Line("<b>", [(1, 2.0), (2, math.nan), (3, 1.0)]), Line("held-out", [(3, 1.5)])], "step", "<i>")
    assert "<b>" not in text
    assert "<i>" not in text
    assert re.findall(r"<li class=\"(of-\d)\">(.*?)</li>", text) == [("of-0", "&lt;b&gt;"), ("of-1", "held-out")]
    assert text.count("<circle") == 1  # a point alone is no line
    assert not chart([Line("a", [(1, math.inf)])], "step", "loss")
