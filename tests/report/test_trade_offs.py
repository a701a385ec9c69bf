"""Points, the front that none of them beats, and how they are shown and kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.report.points import FOUND, point
from thesean.errors import DataError, PlanError, WriteError
from thesean.report.points import Cost
from thesean.report.trade_offs import TradeOffs


def names(found, place):
    return [p.name for p in found.optimal(place)]


def test_the_front_holds_what_no_other_point_beats_the_fastest_first():
    assert names(FOUND, ("token", 8, 1)) == ["guide"]
    assert names(FOUND, ("token", 64, 1)) == ["converted", "1 of 2", "guide"]
    assert names(FOUND, ("prefill", 64, 1)) == ["converted", "1 of 2", "guide"]
    assert names(FOUND, ("prefill", 512, 1)) == []


def test_of_two_as_fast_and_of_two_as_good_one_is_on_the_front():
    points = [point(n, loss, ms, ms, ms, ms) for n, loss, ms in (("a", 1.0, 2.0), ("b", 2.0, 2.0), ("c", 1.0, 3.0))]
    assert names(replace(FOUND, points=tuple(points)), ("token", 8, 1)) == ["a"]


def test_what_is_faster_by_less_than_turns_differ_is_not_on_the_front_for_it():
    """The worst of three is clearly faster than the best, and stays; the one between can't be told from the best."""
    points = []
    for name, loss, (p20, ms, p80) in (
        ("a", 1.0, (2.0, 3.0, 4.0)),
        ("b", 2.0, (1.5, 2.5, 3.5)),
        ("c", 3.0, (0.5, 1.0, 1.6)),
    ):
        made = point(name, loss, ms, ms, ms, ms)
        served = tuple(replace(s, token=Cost(median_ms=ms, p20_ms=p20, p80_ms=p80, repeats=9)) for s in made.served)
        points.append(replace(made, served=served))
    assert names(replace(FOUND, points=tuple(points)), ("token", 8, 1)) == ["c", "a"]


def test_a_loss_that_is_no_number_is_beaten_by_all():
    points = (point("lost", math.nan, 0.1, 0.1, 0.1, 0.1), *FOUND.points)
    assert names(replace(FOUND, points=points), ("token", 8, 1)) == ["guide"]


def test_without_a_loss_of_all_points_the_divergence_ranks():
    assert FOUND.quality == "loss"
    assert replace(FOUND, points=(*FOUND.points, point("another", None, 1, 1, 1, 1))).quality == "divergence"


def test_places_are_what_was_measured_and_tokens_come_first():
    assert FOUND.places == (("token", 8, 1), ("token", 64, 1), ("prefill", 8, 1), ("prefill", 64, 1))


def test_it_is_a_sequence_that_prints_its_stars_and_its_notes():
    assert len(FOUND) == 4
    assert FOUND[0].name == "guide"
    assert [p.name for p in FOUND[1:3]] == ["1 of 2", "converted"]
    lines = str(FOUND).splitlines()
    assert lines[1].split("  ")[-1] == "peak"
    guide = next(line for line in lines if line.startswith("guide"))
    for cell in ("1.0000", "2 k", "8 kB", "1 ms*", "9 ms*", "100 ms*", "6.4 kB", "12 MiB"):
        assert cell in guide
    quantised = next(line for line in lines if line.startswith("converted, int8"))
    assert "*" not in quantised
    assert " - " in quantised
    assert lines[-1] == "note: a <b>note</b>"


def test_it_is_told_who_reads_everything_again():
    slow = replace(FOUND[1], name="slow", token_kind="recompute")
    told = str(replace(FOUND, points=(*FOUND.points, slow)))
    assert "without a state, a token reads all again: slow" in told


def test_json_gives_back_the_same(tmp_path: Path):
    path = FOUND.to_json(tmp_path / "found.json")
    assert TradeOffs.from_json(path) == FOUND
    assert TradeOffs.from_dict(json.loads(path.read_text())) == FOUND
    lost = replace(FOUND, points=(point("lost", math.nan, 1, 1, 1, 1),)).to_json(tmp_path / "lost.json")
    assert TradeOffs.from_json(lost)[0].loss is None


@pytest.mark.parametrize(
    ("text", "told"), [("{", "expected JSON"), ("{}", "no trade-offs: points"), ("[]", "no trade-offs")]
)
def test_what_is_none_is_refused(text, told, tmp_path: Path):
    (tmp_path / "found.json").write_text(text)
    with pytest.raises(DataError, match=told):
        TradeOffs.from_json(tmp_path / "found.json")
    with pytest.raises(DataError, match="can't read"):
        TradeOffs.from_json(tmp_path / "none.json")


def test_the_picture_is_well_formed_knows_two_themes_and_names_its_points(tmp_path: Path):
    path = FOUND.draw(tmp_path / "found.svg")
    text = path.read_text()
    assert text == FOUND.svg()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme:dark" in text
    words = [e.text for e in root.iter() if e.tag.endswith("}text")]
    for told in ("loss: a token after 8, batch 1", "loss: a prefill of 64 tokens, batch 1", "guide", "converted"):
        assert told in words
    assert not [e for e in root.iter() if "href" in "".join(e.attrib) or e.tag.endswith("script")]
    squares = [e for e in root.iter() if e.tag.endswith("}rect") and "dot" in e.get("class", "")]
    assert len(squares) == 2  # of the quantised one, which has no prefill


def test_the_picture_can_be_of_some_lengths_and_refuses_others(tmp_path: Path):
    assert FOUND.svg(lengths=[64]).count("a token after") == 1
    with pytest.raises(DataError, match=r"nothing was measured at batch 8; there is: a token after 8, batch 1"):
        FOUND.draw(tmp_path / "found.svg", batch=8)
    with pytest.raises(PlanError, match=r"ends in \.svg or \.png"):
        FOUND.draw(tmp_path / "found.pdf")
    with pytest.raises(WriteError):
        FOUND.draw(tmp_path / "none" / "found.svg")


def test_a_png_shows_the_same(tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert FOUND.draw(tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
