"""Which parts a guide is divided into, by what is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests import captured
from thesean.errors import PlanError
from thesean.passes.plan.divide import divide, divide_as, group_matches
from thesean.passes.plan.make_plan import make_plan

BLOCKS = ["mix.0..wise.0.2", "mix.1..wise.1.2"]
HALVES = ["mix.0", "wise.0", "mix.1", "wise.1"]
FINEST = ["mix.0", "wise.0.0..1", "wise.0.2", "mix.1", "wise.1.0..1", "wise.1.2"]
BOTH = "mix.0..wise.0.2..1..wise.1.2"

# what targets are given by, and what else is asked for; parts, granularity, globs of parts, whether blocks are wanted
ASKED: list[tuple[list[str], dict[str, Any], list[str], str, tuple[str, ...] | None, bool]] = [
    ([], {}, BLOCKS, "block", None, False),
    ([], {"granularity": "block"}, BLOCKS, "block", None, True),
    ([], {"granularity": "sublayer"}, HALVES, "sublayer", None, False),
    ([], {"granularity": "finest"}, FINEST, "finest", None, False),
    ([], {"merge": 2}, [BOTH], "block", None, False),
    ([], {"merge": 2, "granularity": "block"}, [BOTH], "block", None, True),
    ([], {"target_parts": 1}, [BOTH], "block", None, False),
    ([], {"target_parts": 2}, BLOCKS, "block", None, False),
    ([], {"parts": ["mix.0"]}, ["mix.0"], "block", ("mix.0",), False),
    ([], {"parts": "mix.*"}, ["mix.0", "mix.1"], "block", ("mix.*",), False),
    ([], {"parts": ["mix.0"], "granularity": "block"}, ["mix.0"], "block", ("mix.0",), False),
    (["*"], {}, BLOCKS, "block", None, False),
    (["mix.0"], {}, BLOCKS, "block", None, False),
    (["wise.0"], {}, HALVES, "sublayer", None, False),
    (["wise.0", "mix.1"], {}, HALVES, "sublayer", None, False),
    (["wise.0"], {"granularity": "block"}, HALVES, "sublayer", None, False),
    (["*.0.0"], {}, FINEST, "finest", None, False),
    (["mix.0"], {"granularity": "sublayer"}, HALVES, "sublayer", None, False),
    (["head"], {}, ["head"], "block", ("head",), False),
    (["head", "mix.0"], {}, ["mix.0", "head"], "block", ("head", "mix.0"), False),
    (["wise.0"], {"parts": ["mix.0"]}, ["mix.0"], "block", ("mix.0",), False),
    (["wise.0"], {"merge": 2}, [BOTH], "block", None, False),
]


@pytest.mark.parametrize(("globs", "asked", "paths", "granularity", "parts", "whole"), ASKED)
def test_parts_are_those_that_are_asked_for_as_fine_as_targets_need_them(
    globs, asked, paths, granularity, parts, whole
):
    found = divide(captured.token_mixer(), globs, **asked)
    assert [g.path for g in found.groups] == paths
    assert (found.settings.granularity, found.settings.part_globs, found.whole) == (granularity, parts, whole)
    assert found.kept == frozenset()
    assert (found.settings.parts, found.settings.notes) == ((), ())


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"keep": "*0*"}, BLOCKS[:1]),
        ({"keep": ["mix.0"]}, BLOCKS[:1]),
        ({"keep": ["*"]}, BLOCKS),
        ({"keep": ("wise.1",), "granularity": "sublayer"}, ["wise.1"]),
        ({"keep": "*1*", "merge": 2}, [BOTH]),
    ],
)
def test_a_part_is_kept_by_its_name_or_by_all_its_members(asked, kept):
    assert divide(captured.token_mixer(), **asked).kept == frozenset(kept)


def test_a_merged_part_is_matched_by_its_name_or_where_all_its_members_are():
    (both,) = divide(captured.token_mixer(), merge=2).groups
    assert both.path == BOTH
    found = {glob: group_matches(both, glob) for glob in (BOTH, "mix.*", "*", "mix.1*", "*.2", "wise")}
    assert found == {BOTH: True, "mix.*": True, "*": True, "mix.1*": False, "*.2": True, "wise": False}


@pytest.mark.parametrize(
    ("globs", "asked", "message"),
    [
        ([], {"merge": 2, "target_parts": 1}, r"merge= and target_parts= say the same thing in two ways"),
        ([], {"keep": "nothing"}, r"keep: no part matches 'nothing'"),
        (["nothing"], {}, r"target: no part matches 'nothing'\. known: "),
        (
            ["head", "*.0.0"],
            {},
            r"target: 'head' is a module and no part beside .*parts=\['head'\] cuts it out",
        ),
    ],
)
def test_what_can_not_be_divided_so_is_told(globs, asked, message):
    with pytest.raises(PlanError, match=message):
        divide(captured.token_mixer(), globs, **asked)


def test_the_member_that_stays_is_the_one_that_was_decided_or_the_most_missed():
    guide = captured.token_mixer()
    decided = divide(guide, target_parts=1)
    assert [m.path for m in decided.members()] == list(decided.keeps.values()) == BLOCKS[1:]
    merged = divide(guide, merge=2)
    assert merged.keeps == {}
    assert [m.path for m in merged.members()] == BLOCKS[1:]
    assert [m.path for m in divide(guide).members()] == BLOCKS
    other = replace(merged, keeps={BOTH: BLOCKS[0]})
    assert [m.path for m in other.members()] == BLOCKS[:1]


def test_a_plan_divides_its_guide_as_it_was_divided_and_no_other():
    guide = captured.token_mixer()
    for asked in ({}, {"granularity": "sublayer"}, {"merge": 2}):
        plan = make_plan(guide, "rnn", **asked).plan
        again = divide_as(guide, plan)
        assert [g.path for g in again.groups] == [p.path for p in plan.parts]
        assert again.settings is plan
        assert again.keeps == {p.path: p.keeps for p in plan.parts if p.keeps is not None}
    first, second = make_plan(guide, "rnn").plan.parts
    plan = make_plan(guide, "rnn").plan
    with pytest.raises(PlanError, match=r"the plan doesn't fit this guide: mix\.1\.\.wise\.1\.2 differs"):
        divide_as(guide, replace(plan, parts=(first,)))
    with pytest.raises(PlanError, match="the plan doesn't fit this guide: the order of parts differs"):
        divide_as(guide, replace(plan, parts=(second, first)))
    with pytest.raises(PlanError, match=r"keeps 'wise\.0', which is none of its members"):
        divide_as(guide, replace(plan, parts=(replace(first, keeps="wise.0"), second)))
