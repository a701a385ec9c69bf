"""Where points, ticks and labels stand."""

from __future__ import annotations

from itertools import combinations

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
