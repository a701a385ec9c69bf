from __future__ import annotations

import pytest

from thesean.choose.constraints import Constraints, parse_budgets, parse_constraints
from thesean.errors import PlanError


def test_a_dict_becomes_constraints_and_tells_what_it_asks():
    found = parse_constraints({"latency_ms": 5.0, "context": 512, "params": 10_000})
    assert found == Constraints(latency_ms=5.0, context=512, params=10_000)
    assert str(found) == "latency at most 5 ms and at most 10,000 parameters"
    assert found.measures
    assert not parse_constraints({"flops": 10}).measures
    assert str(parse_constraints({"speedup": 1.5})) == "1.5 times as fast as the guide"


@pytest.mark.parametrize("given", [None, {}, {"context": 512}])
def test_no_bound_at_all_is_refused_with_examples(given):
    with pytest.raises(PlanError, match="needs a budget: constraints="):
        parse_constraints(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency": 5}, "constraints: latency: .*known: latency_ms, speedup"),
        ({"latency_ms": -1}, "constraints: latency_ms: Input should be greater than 0"),
        ({"speedup": 2, "kind": "decode"}, "constraints: kind: "),
        ([("speedup", 2)], "constraints: expected a dict, found list"),
    ],
)
def test_wrong_fields_are_named(given, message):
    with pytest.raises(PlanError, match=message):
        parse_constraints(given)


def test_a_list_is_read_one_by_one():
    found = parse_budgets([{"speedup": 1.25, "context": 8}, {"speedup": 2, "context": 8}, {"params": 3}])
    assert [str(one) for one in found] == [
        "1.25 times as fast as the guide", "2 times as fast as the guide", "at most 3 parameters",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected at least one budget, found none"),
        ([{"params": 3}, {"speed": 2}], r"constraints\[1\]: speed: "),
        ([{"params": 3}, 2.0], r"constraints\[1\]: expected a dict, found float"),
        ([{"speedup": 2, "context": 8}, {"speedup": 2, "context": 9}], "need the same context, batch and kind"),
    ],
)
def test_of_a_list_the_wrong_one_is_named(given, message):
    with pytest.raises(PlanError, match=message):
        parse_budgets(given)
