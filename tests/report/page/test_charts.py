"""Where points, ticks and labels stand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from thesean.report.page.charts import HEIGHT, WIDTH, Axes, Line, plotted
from thesean.report.page.shapes import Spot, Words

AXES = Axes(x="ms", y="loss", whole=False, ratios=True)


def labelled(points, **rest):
    labels = [f"point {i}" for i in range(len(points))]
    line = Line(name="all", points=points, dots=True, joined=False, labels=labels, named=range(len(points)), **rest)
    shapes = plotted(AXES, [line])
    return [s for s in shapes if isinstance(s, Spot)], [s for s in shapes if isinstance(s, Words) and s.kind == "label"]


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_labels_never_cover_each_other_nor_leave_the_chart():
    crowd = [(1 + 0.01 * i, 1 + 0.001 * (i % 3)) for i in range(12)] + [(400.0, 2.0), (0.5, 0.5)]
    spots, labels = labelled(crowd)
    assert len(spots) == len(crowd)
    assert 2 <= len(labels) < len(crowd)
    assert not [1 for a, b in combinations(labels, 2) if overlap(a.box, b.box)]
    for label in labels:
        left, top, right, bottom = label.box
        assert 0 <= left < right <= WIDTH
        assert 0 <= top < bottom <= HEIGHT


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([4.2154060, 4.2154100, 4.2154082], "4.215408"),
        ([0.0, 1e-6, 5e-7], "1.0e-6"),
        ([2.5e15, 1e15], "2.0e15"),
        ([1.0, math.nextafter(1.0, 2)], ""),
        ([1.0, 2.0, 1e200, -math.inf, math.nan], "1.5"),
    ],
)
def test_whatever_the_size_of_values_their_labels_stay_within_the_chart(values, told):
    shapes = plotted(Axes(x="step", y="loss"), [Line(name="all", points=list(enumerate(values)))])
    levels = [s for s in shapes if isinstance(s, Words) and s.anchor == "end"]
    assert all(level.box[0] >= 0 for level in levels)
    assert not told or told in {level.text for level in levels}


def test_the_first_that_is_named_takes_the_room():
    _, labels = labelled([(1.0, 1.0), (1.0, 1.0), (1.0, 1.0)] * 4)
    assert labels[0].text == "point 0"


def test_ratios_are_drawn_as_ratios_where_they_are_wide_and_as_differences_where_not():
    x = [spot.x for spot in labelled([(1.0, 0.0), (10.0, 1.0), (100.0, 2.0)])[0]]
    assert round(x[1] - x[0], 6) == round(x[2] - x[1], 6)
    shapes = plotted(AXES, [Line(name="all", points=[(1.0, 0.0), (100.0, 1.0)], dots=True)])
    assert {"1", "10", "100"} <= {s.text for s in shapes if isinstance(s, Words)}
    near = [spot.x for spot in labelled([(1.0, 0.0), (2.0, 1.0), (4.0, 2.0)])[0]]
    assert round(near[2] - near[1], 6) == round(2 * (near[1] - near[0]), 6)
