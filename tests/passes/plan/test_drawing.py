from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.passes.plan.test_table import PLAN
from thesean.errors import MissingExtraError, PlanError, WriteError
from thesean.passes.plan.drawing import picture_of
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import PlannedPart
from thesean.passes.plan.svg import Arrow, Box, Picture, Text

SVG = "{http://www.w3.org/2000/svg}"
TARGETS = ("gru", "keep", "linear-attention", "narrow")


def long_plan(count: int = 48) -> Plan:
    parts = tuple(
        PlannedPart(
            path=f"model.encoder.transformer.blocks.{i}.first..model.encoder.transformer.blocks.{i}.last",
            target=TARGETS[i % 4], operators="attention + gated mlp", params=7_000_000 + 10_000 * i, flops=10**9,
            new_params=5_000_000, new_flops=10**8,
        )
        for i in range(count)
    )  # fmt: skip
    return Plan(parts=parts, sizes={"batch": 1}, params=10**9, flops=10**12, new_params=10**8, new_flops=10**11)


@pytest.mark.parametrize("plan", [PLAN, long_plan(), long_plan(1)])
def test_the_svg_is_well_formed_and_names_every_part(plan: Plan, tmp_path: Path):
    root = ElementTree.fromstring(plan.draw(tmp_path / "plan.svg").read_text(encoding="utf-8"))
    assert root.tag == f"{SVG}svg"
    hints = [t.text for t in root.iter(f"{SVG}title")]
    for part in plan:
        assert hints.count(part.path) == 2  # above and below
    words = [t.text or "" for t in root.iter(f"{SVG}text")]
    assert sum(w in TARGETS or w.startswith("gru(") for w in words) >= len(plan.replaced)


def test_names_with_markup_in_them_are_escaped(tmp_path: Path):
    odd = replace(PLAN.parts[0], path="a<b>&'\"]]>", options={"init": "<&>"})
    text = replace(PLAN, parts=(odd,)).draw(tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert "a<b>&'\"]]>" in [t.text for t in ElementTree.fromstring(text).iter(f"{SVG}title")]


def overlap(a: Box, b: Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


def inside(picture: Picture, box: Box) -> bool:
    right, bottom = box.x + box.width, box.y + box.height
    return min(box.x, box.y) >= 0 and right <= picture.width and bottom <= picture.height


@pytest.mark.parametrize("plan", [PLAN, long_plan()])
def test_boxes_stand_apart_and_words_stay_inside_them(plan: Plan):
    picture = picture_of(plan)
    assert not any(overlap(a, b) for a, b in itertools.combinations(picture.boxes, 2))
    assert all(inside(picture, box) for box in picture.boxes)
    if plan is not PLAN:  # of which the title is wider than its boxes
        assert picture.width - max(b.x + b.width for b in picture.boxes) == min(b.x for b in picture.boxes)
    for text in picture.texts:
        if not text.centred:
            words = Box(x=text.x, y=text.y - text.size, width=text.width, height=text.size, fill="", edge="")
            assert not any(overlap(words, box) for box in picture.boxes), text
        left = text.x - text.width / 2 if text.centred else text.x
        assert left >= 0
        assert left + text.width <= picture.width
        if text.centred:
            assert any(
                b.x <= left
                and left + text.width <= b.x + b.width
                and b.y <= text.y - text.size
                and text.y <= b.y + b.height
                for b in picture.boxes
            ), text


@pytest.mark.parametrize(
    ("params", "told"), [(120_000, "20 k params"), (100_000, "0 params"), (90_000, "0 params")], ids=str
)
def test_what_no_part_covers_is_told_where_there_is_any(params, told):
    words = [t.words for t in picture_of(replace(PLAN, params=params)).texts]
    assert told in words[words.index("the rest") :]
    assert "1 M FLOPs" in words[words.index("the rest") :]
    nothing = replace(PLAN, params=100_000, flops=12_000_000)
    assert "the rest" not in [t.words for t in picture_of(nothing).texts]


def test_a_long_path_breaks_after_a_dot_and_loses_nothing():
    words = [t.words for t in picture_of(long_plan(1)).texts if t.bold and t.centred]
    first = words[: words.index("gru")]
    assert len(first) > 1
    assert all(line.endswith(".") for line in first[:-1])
    assert "".join(first) == long_plan(1).parts[0].path


def test_long_plans_wrap_to_rows():
    picture = picture_of(long_plan())
    assert picture.width < 1700
    assert len({b.y for b in picture.boxes if b.hint}) > 6


def test_heights_grow_with_latency_and_with_parameters_where_nothing_was_measured():
    measured = [b for b in picture_of(PLAN).boxes if b.hint == "h.0"]
    assert measured[1].height - measured[0].height == pytest.approx((1.9 - 1.25) / 1.9 * 90)
    plain = replace(PLAN, latencies=(), parts=tuple(replace(p, latency_ms=None, new_latency_ms=None) for p in PLAN))
    counted = [b for b in picture_of(plain).boxes if b.hint == "h.0"]
    assert counted[1].height - counted[0].height == pytest.approx((58 - 50) / 58 * 90)


def test_what_was_measured_of_both_is_told():
    def told(plan: Plan) -> str:
        return " ".join(text.words for text in picture_of(plan).texts)

    first = PLAN.latencies[0]
    both = f"FLOPs, {first.guide_ms:.3g} -> {first.plan_ms:.3g} ms"
    assert both in told(PLAN)
    for half in (replace(first, guide_ms=None), replace(first, plan_ms=None)):
        assert "FLOPs, " not in told(replace(PLAN, latencies=(half,)))


def test_a_kept_part_is_grey_and_targets_differ_in_colour():
    fills = {b.hint.split(".")[-2]: b.fill for b in picture_of(long_plan(4)).boxes[1:] if b.hint.endswith(".last")}
    assert len(set(fills.values())) == 4
    assert fills["1"] == "#eeeeee"


def test_another_format_is_refused_before_anything_is_drawn(tmp_path: Path):
    with pytest.raises(PlanError, match=r"ends in \.svg or \.png, found '\.pdf'"):
        PLAN.draw(tmp_path / "plan.pdf")
    with pytest.raises(PlanError, match="found no ending"):
        PLAN.draw(tmp_path / "plan")
    with pytest.raises(WriteError, match="can't write"):
        PLAN.draw(tmp_path / "nowhere" / "plan.svg")


def test_a_png_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    assert PLAN.draw(tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"thesean-compiler\[report\]"):
        PLAN.draw(tmp_path / "plan.png")


PICTURE = Picture(
    width=200, height=100, title="two",
    boxes=(Box(x=20, y=10, width=60, height=20, fill="#ff0000", edge="#0000ff", hint="a"),
           Box(x=120, y=60, width=40, height=30, fill="#00ff00", edge="#0000ff")),
    texts=(Text(x=50, y=80, words="bold", bold=True), Text(x=10, y=95, words="plain", size=9, centred=False)),
    arrows=(Arrow(x=100, y=20, end=70),),
)  # fmt: skip


def test_an_svg_says_what_is_drawn_where():
    root = ElementTree.fromstring(PICTURE.svg())
    assert (root.get("width"), root.get("height"), root.get("viewBox")) == ("200", "100", "0 0 200 100")
    ground, *boxes = root.iter(f"{SVG}rect")
    assert (ground.get("fill"), ground.get("width"), ground.get("height")) == ("white", "200", "100")
    sides = ("x", "y", "width", "height", "fill", "stroke")
    assert [tuple(b.get(s) for s in sides) for b in boxes] == [
        ("20", "10", "60", "20", "#ff0000", "#0000ff"), ("120", "60", "40", "30", "#00ff00", "#0000ff"),
    ]  # fmt: skip
    assert [[t.text for t in box] for box in boxes] == [["a"], []]
    looks = ("x", "y", "font-size", "font-weight", "text-anchor")
    assert [tuple(t.get(look) for look in looks) for t in root.iter(f"{SVG}text")] == [
        ("50", "80", "11", "bold", "middle"), ("10", "95", "9", None, None),
    ]  # fmt: skip
    (line,), (tip,) = root.iter(f"{SVG}line"), root.iter(f"{SVG}polygon")
    assert [line.get(k) for k in ("x1", "y1", "x2", "y2")] == ["100", "20", "100", "66"]
    assert tip.get("points") == "96,64 104,64 100,70"


def test_a_png_shows_the_same_at_twice_the_size(tmp_path: Path):
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(PICTURE.write(tmp_path / "two.png"))[..., :3]
    assert pixels.shape == (200, 400, 3)
    for box in PICTURE.boxes:
        wanted = [int(box.fill[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        found = (pixels == wanted).all(-1)
        assert found[int(2 * box.y + box.height), int(2 * box.x + box.width)]
        rows, columns = found.any(1).nonzero()[0], found.any(0).nonzero()[0]
        corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        sides = [box.x, box.y, box.x + box.width, box.y + box.height]
        assert corners == pytest.approx([2 * side for side in sides], abs=3)  # within its edge
    dark = (pixels < 0.7).all(-1)
    assert dark[60:100, 196:205].any()  # the arrow
    assert dark[140:164, 60:140].any()  # and both texts
    assert dark[170:195, 20:80].any()
    assert not dark[:, 340:].any()


def test_a_png_has_names_with_dollars_as_they_are(tmp_path: Path):
    """Between two of them matplotlib reads formulas, and an unknown word there is an error."""
    image = pytest.importorskip("matplotlib.image")
    words = (Text(x=50, y=50, words=r"a$\b$c"),)
    picture = Picture(width=100, height=60, title="named", boxes=(), arrows=(), texts=words)
    assert (image.imread(picture.write(tmp_path / "named.png")) < 0.7).any()
