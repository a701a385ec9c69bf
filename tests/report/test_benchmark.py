"""What a benchmark says and prints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from thesean.report.benchmark import Benchmark


def spread(median_ms: float) -> dict[str, float]:
    return {"median_ms": median_ms, "p20_ms": median_ms * 0.9, "p80_ms": median_ms * 1.5, "repeats": 20}


def made(**fields: Any) -> Benchmark:
    given: dict[str, Any] = {
        "converted": {"prefill_64": spread(2.0), "prefill_512": None, "token_64": spread(0.04)},
        "guide": {"prefill_64": spread(3.0), "prefill_512": spread(2500.0), "token_64": spread(3.0)},
        "contexts": (64, 512),
        "batch": 2,
        "token_kinds": {"converted": "state", "guide": "recompute"},
        "environment": {"cpu": "A processor", "cores": 2, "torch": "2.13", "commit": None},
    }
    return Benchmark(**{**given, **fields})


def test_it_prints_both_networks_with_units_and_where_they_ran():
    assert str(made()).splitlines() == [
        "onnxruntime, one thread, batch 2: median (20th to 80th percentile)",
        "                       converted               guide",
        "prefill of 64 tokens   2 ms (1.8 ms to 3 ms)   3 ms (2.7 ms to 4.5 ms)",
        "prefill of 512 tokens  -                       2.5 s (2.25 s to 3.75 s)",
        "token at 64            40 us (36 us to 60 us)  3 ms (2.7 ms to 4.5 ms)",
        "a token: converted carries a state and reads one token",
        "a token: guide carries no state and reads all tokens again",
        "A processor, cores 2, torch 2.13",
    ]


def test_without_a_guide_it_says_why():
    alone = made(guide=None, token_kinds={"converted": "state"}, note="the guide was not timed: why")
    lines = str(alone).splitlines()
    assert lines[1].split() == ["converted"]
    assert lines[-2] == "note: the guide was not timed: why"
    assert "key-value" not in str(alone)


def test_it_is_a_mapping_of_the_converted_networks_medians():
    found = made()
    assert found["token_64"] == 0.04
    assert dict(found) == found == {"prefill_64": 2.0, "prefill_512": None, "token_64": 0.04}
    assert repr(found) == "Benchmark({'prefill_64': 2.0, 'prefill_512': None, 'token_64': 0.04})"
    with pytest.raises(KeyError):
        found["forward"]


def test_all_of_it_is_json():
    data = json.loads(json.dumps(made().to_dict()))
    assert (data["unit"], data["threads"], data["batch"], data["contexts"]) == ("ms", 1, 2, [64, 512])
    assert data["guide"]["prefill_64"] == spread(3.0)
    assert data["token_kinds"] == {"converted": "state", "guide": "recompute"}
    assert data["environment"]["cpu"] == "A processor"
