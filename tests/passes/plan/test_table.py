from __future__ import annotations

from dataclasses import replace

from torch import nn

from tests import captured
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import PlanLatency, PlannedPart
from thesean.targets import Target

PLAN = Plan(
    parts=(
        PlannedPart(
            path="h.0", target="gru", options={"width": 64}, scope="mixing", replaces=("h.0.attn",),
            operators="attention + mlp", mixing="causal", input_shape=("batch", "time", 64),
            output_shape=("batch", "time", 64), drops=("mask",), params=50_000, flops=6_000_000, new_params=58_000,
            new_flops=7_000_000, latency_ms=1.25, new_latency_ms=1.9,
        ),
        PlannedPart(
            path="h.1", target="keep", operators="attention + mlp", mixing="causal",
            input_shape=("batch", "time", 64), output_shape=("batch", "time", 64), params=50_000, flops=6_000_000,
            latency_ms=1.25,
        ),
    ),
    sizes={"batch": 1, "time": 128}, params=120_000, flops=13_000_000, new_params=128_000, new_flops=14_000_000,
    latencies=(
        PlanLatency(context=128, batch=1, kind="prefill", guide_ms=2.6, plan_ms=3.25, ceiling_ms=1.3),
        PlanLatency(
            context=128, batch=1, kind="token", guide_ms=2.6, plan_ms=0.25, ceiling_ms=0.1, cache_floor_ms=0.5
        ),
        PlanLatency(context=2048, batch=1, kind="prefill", guide_ms=1250.0, plan_ms=None, ceiling_ms=125.0),
    ),
    notes=("warning: target 'gru' is slower than the parts it replaces at 128 tokens: 1.9 ms against 1.25 ms",),
)  # fmt: skip

PRINTED = """\
1 of 2 parts replaced; FLOPs at batch 1, time 128; ms at 128 tokens, batch 1

 part         operators        mixing  shape              params  FLOPs    ms  target         params'  FLOPs'   ms'  note
 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
 h.0          attention + mlp  causal  batch x time x 64    50 k    6 M  1.25  gru(width=64)     58 k     7 M   1.9  replaces attn; drops
                                                                                                                     mask
 h.1          attention + mlp  causal  batch x time x 64    50 k    6 M  1.25  keep

 whole model                                               120 k   13 M   2.6                   128 k    14 M  3.25

ms in onnxruntime, 1 thread, targets untrained; ceiling: the guide without the replaced parts

 measured                  guide  KV cache, at least  plan  ceiling  plan is  at most
 ────────────────────────────────────────────────────────────────────────────────────
 prefill of 128, batch 1     2.6                      3.25      1.3     0.8x       2x
 token after 128, batch 1    2.6                 0.5  0.25      0.1       2x       5x
 prefill of 2048, batch 1   1250                                125               10x

token: the guide reads everything again; plan and ceiling are compared with the least that a key-value cache takes
- warning: target 'gru' is slower than the parts it replaces at 128 tokens: 1.9 ms against 1.25 ms"""  # noqa: E501


def test_a_measured_plan_prints_parts_latencies_and_notes():
    assert str(PLAN) == PRINTED


def test_columns_without_content_are_left_out():
    plain = make_plan(captured.resnet(), "mlp").plan
    header = str(plain).splitlines()[2].split()
    assert header == ["part", "operators", "mixing", "shape", "params", "FLOPs", "target", "params'", "FLOPs'"]
    assert "onnxruntime" not in str(plain)


def test_long_words_fold_and_no_column_is_lost():
    path = "model.encoder.transformer.blocks.0..model.encoder.transformer.blocks.11"
    long = replace(PLAN.parts[0], path=path, options={"width": 128, "window": 64}, drops=("attention_mask", "ids"))
    lines = str(replace(PLAN, parts=(long, *PLAN.parts[1:]), notes=("a note of many words " * 20,))).splitlines()
    assert max(map(len, lines)) <= 140
    assert lines[2].split()[-3:] == ["FLOPs'", "ms'", "note"]
    start, stop = lines[2].index("part"), lines[2].index("operators")
    rows = lines[4 : next(i for i, line in enumerate(lines) if line.startswith(" h.1"))]
    assert "".join(row[start:stop].strip() for row in rows) == path


def test_a_guide_that_does_not_decode_has_no_word_of_caches():
    assert "cache" not in str(replace(PLAN, latencies=PLAN.latencies[:1]))


def test_what_all_replacements_drop_is_told_once():
    deaf = Target("mine", build=lambda part: nn.Linear(part.width_in, part.width_out))
    plan = make_plan(captured.bert(), deaf).plan
    assert str(plan).count("attention_mask") == 1
    assert "no replacement reads attention_mask" in str(plan)
