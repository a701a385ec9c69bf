"""What is said of figures written by hand."""

from __future__ import annotations

from typing import Any

import torch

from thesean.deploy.timing.latency import Timing
from thesean.deploy.timing.verdicts import Measurement, is_level, is_slower, slower_targets, verdicts
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.passes.plan.rows import LatencyKind, PlanLatency


def around(median_ms: float, spread: float = 0.01) -> Timing:
    """Percentiles 1% below and above."""
    return Timing(median_ms=median_ms, p20_ms=median_ms * (1 - spread), p80_ms=median_ms * (1 + spread), repeats=15)


def place(
    guide: float, plan: float | None, ceiling: float | None, context: int | None = 128, batch: int = 1, **settings: Any
) -> Measurement:
    kind: LatencyKind = "forward" if context is None else "prefill"
    known = {name: None if v is None else around(v) for name, v in (("plan", plan), ("ceiling", ceiling))}
    return Measurement(
        **{"context": context, "batch": batch, "kind": kind, "guide": around(guide), **known, **settings}
    )


def test_ranges_that_overlap_are_level():
    assert is_level(around(1.0), around(1.015))
    assert not is_level(around(1.0), around(1.03))
    assert is_slower(around(1.03), around(1.0))
    assert not is_slower(around(1.015), around(1.0))


def test_a_ceiling_is_told_with_the_place_where_it_is_higher():
    # 1 - 10 / 13.5 = 26%, 13.5 / 10 = 1.35; 600 / 100 = 6
    found = verdicts([place(13.5, 14.5, 10.0), place(600.0, 150.0, 100.0, 4096)])
    assert len(found) == 2
    assert found[0] == (
        "the replaced parts are 26% of the latency at 128 tokens: no replacement of them can exceed 1.35x; this plan "
        "is slower than the guide and does not pay (14.5 ms against 13.5 ms); at 4096 tokens the ceiling is 6x"
    )
    assert found[1] == (
        "the replaced parts are 83% of the latency at 4096 tokens: no replacement of them can exceed 6x; this plan "
        "reaches 4x"
    )


def test_where_the_plan_pays_no_other_place_is_named():
    (first, _) = verdicts([place(13.5, 11.0, 10.0), place(600.0, 150.0, 100.0, 4096)])
    assert first.endswith("can exceed 1.35x; this plan reaches 1.23x")


def test_other_batches_are_other_places():
    (first, second) = verdicts([place(13.5, 14.5, 10.0), place(100.0, 14.5, 10.0, batch=8)])
    assert "the ceiling is" not in first
    assert second.startswith("the replaced parts are 90% of the latency at 128 tokens, batch 8: ")


def test_differences_within_the_noise_are_level():
    (found,) = verdicts([place(10.0, 10.1, 5.0)])
    assert found.endswith("this plan is level with the guide and does not pay (10.1 ms against 10 ms)")
    (found,) = verdicts([place(10.0, 11.0, 9.95)])
    assert found == (
        "without the replaced parts the latency at 128 tokens is level with the guide's (9.95 ms against 10 ms): no "
        "replacement of them can be seen to pay; this plan is slower than the guide and does not pay (11 ms against "
        "10 ms)"
    )


def test_a_network_without_time_has_a_forward_pass():
    (found,) = verdicts([place(2.0, 1.0, 0.5, context=None)])
    assert (
        found
        == "the replaced parts are 75% of a forward pass: no replacement of them can exceed 4x; this plan reaches 2x"
    )


def test_what_was_not_measured_is_not_guessed():
    (found,) = verdicts([place(2.0, None, None)])
    assert found == "how much of the latency the replaced parts are at 128 tokens could not be measured"


def token(plan: float | None, floor: float | None = 0.5, steps: bool = True) -> str:
    cache = None if floor is None else around(floor)
    (found,) = verdicts([place(5.0, plan, 0.2, kind="token", cache_floor=cache, steps=steps)])
    return found


def test_a_token_is_compared_with_the_least_that_a_cache_can_take():
    assert token(0.25) == (
        "one more token after 128: this plan is at least 2x as fast as any key-value cache (0.25 ms against 0.5 ms or "
        "more)"
    )
    assert "is level with the least that a key-value cache can take (0.501 ms" in token(0.501)
    assert "a key-value cache can be faster than this plan while the past is short (0.8 ms" in token(0.8)


def test_a_plan_without_state_is_told_to_read_everything_again():
    assert token(4.5, steps=False).endswith("this plan carries no state and reads everything again (4.5 ms)")
    assert token(None).endswith("this plan was not measured")
    assert token(2.5, floor=None).endswith("this plan reaches 2x")  # a guide that carries a state itself


def test_a_target_that_is_slower_than_what_it_replaces_is_warned_of_by_name():
    # 11.9 - 10 = 1.9 ms in place of 11.2 - 10 = 1.2 ms
    found = slower_targets([place(11.2, 11.9, 10.0), place(100.0, 50.0, 20.0, 4096)], {}, ["gru", "gru"])
    assert found == ["warning: target 'gru' is slower than the parts it replaces at 128 tokens: 1.9 ms against 1.2 ms"]
    assert slower_targets([place(11.2, 11.3, 10.0)], {}, ["gru"]) == []
    assert slower_targets([place(11.2, None, 10.0)], {}, ["gru"]) == []


def test_among_several_targets_the_slow_one_is_named():
    parts = {"gru": [(around(1.0), around(2.0))] * 2, "mlp": [(around(3.0), around(1.0))]}
    assert slower_targets([place(10.0, 8.0, 5.0)], parts, ["gru", "gru", "mlp"]) == [
        "warning: target 'gru' is slower than the parts it replaces at 128 tokens: 4 ms against 2 ms"
    ]


def test_rows_hold_medians():
    found = place(5.0, 0.25, 0.2, kind="token", cache_floor=around(0.5), steps=True).row()
    assert found == PlanLatency(
        context=128, batch=1, kind="token", guide_ms=5.0, plan_ms=0.25, ceiling_ms=0.2, cache_floor_ms=0.5
    )


def test_wide_ranges_do_not_hide_a_difference_of_medians():
    noisy = [Timing(median_ms=m, p20_ms=0.05, p80_ms=2.0, repeats=15) for m in (0.3, 0.7)]
    assert is_slower(noisy[1], noisy[0])
    assert not is_level(*noisy)


def test_what_has_fixed_rows_is_measured_with_them():
    def signature(*shape: int | str) -> Signature:
        spec = InputSpec(name="x", dtype=torch.float32, shape=shape)
        return Signature(inputs=(spec,))

    assert [signature(*shape).fixed_rows or 1 for shape in ((3, 8), ("rows", 8), ())] == [3, 1, 1]
