from __future__ import annotations

import pytest

from thesean.choose.constraints import Constraints, parse_constraints
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
