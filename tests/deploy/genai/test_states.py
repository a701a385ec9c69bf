"""Graphs with genai's names, carried as genai does, against the same graphs with their own states.

B batch, T time, S steps so far
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from thesean.deploy.genai.states import Caches, rename_states
from thesean.errors import ExportError

PAD = 7
MASK = "attention_mask"
CHUNKS = (5, 1, 3, 1)

# A sum over what is remembered of tokens that are seen, from states of every kind.
NETWORK = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (int64[batch, time] position_ids, MASK int64[batch, time] input_ids, float[batch, past, 6] state_in_latent,
        bool[batch, past] state_in_seen, float16[batch, 3] state_in_half, bool[batch, 2] state_in_flag,
        float[batch, 2, 1, 2] state_in_sums, int64[1] state_in_step, float[1, 2] state_in_shared,
        int64[batch] state_in_count)
    => (float[batch, time] logits, float[batch, total, 6] state_out_latent, bool[batch, total] state_out_seen,
        float16[batch, 3] state_out_half, bool[batch, 2] state_out_flag, float[batch, 2, 1, 2] state_out_sums,
        int64[1] state_out_step, float[1, 2] state_out_shared, int64[batch] state_out_count)
{
    one = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    point_five = Constant <value = float[1] {0.5}> ()
    half = Cast <to = 10> (point_five)
    word_BT = Cast <to = 1> (input_ids)
    word_BT1 = Unsqueeze (word_BT, two)
    row = Constant <value = float[6] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}> ()
    new_BT6 = Mul (word_BT1, row)
    state_out_latent = Concat <axis = 1> (state_in_latent, new_BT6)
    shape_BT = Shape (input_ids)
    NEW
    state_out_seen = Concat <axis = 1> (state_in_seen, new_seen)
    seen_BS = Cast <to = 1> (state_out_seen)
    seen_BS1 = Unsqueeze (seen_BS, two)
    kept_BS6 = Mul (state_out_latent, seen_BS1)
    last = Constant <value = int64[2] {1, 2}> ()
    sum_B1 = ReduceSum <keepdims = 0> (kept_BS6, last)
    sum_column = Unsqueeze (sum_B1, one)
    times = Shape <start = 1, end = 2> (input_ids)
    state_out_step = Add (state_in_step, times)
    step = Cast <to = 1> (state_in_step)
    summed_BT = Add (sum_column, step)
    halved_B3 = Mul (state_in_half, half)
    first_B1 = ReduceMax <keepdims = 1> (word_BT, one)
    first_half = Cast <to = 10> (first_B1)
    state_out_half = Add (halved_B3, first_half)
    half_sum = ReduceSum <keepdims = 1> (state_in_half, one)
    half_B1 = Cast <to = 1> (half_sum)
    even_BT = Mod (input_ids, two)
    is_odd_BT = Cast <to = 1> (even_BT)
    any_odd_B1 = ReduceMax <keepdims = 1> (is_odd_BT, one)
    odd_B1 = Cast <to = 9> (any_odd_B1)
    state_out_flag = Xor (state_in_flag, odd_B1)
    flag_B2 = Cast <to = 1> (state_in_flag)
    flag_B1 = ReduceSum <keepdims = 1> (flag_B2, one)
    by_head = Constant <value = float[1, 2, 1, 2] {1.0, 2.0, 3.0, 4.0}> ()
    first_B111 = Unsqueeze (first_B1, last)
    raised_B212 = Mul (first_B111, by_head)
    state_out_sums = Add (state_in_sums, raised_B212)
    others = Constant <value = int64[2] {2, 3}> ()
    two_B2 = ReduceMax <keepdims = 0> (state_in_sums, others)
    sums_B1 = ReduceSum <keepdims = 1> (two_B2, one)
    tenth = Constant <value = float[1, 2] {0.1, 0.2}> ()
    state_out_shared = Add (state_in_shared, tenth)
    shared_11 = ReduceSum <keepdims = 1> (state_in_shared, one)
    token_BT = Cast <to = 7> (new_seen)
    tokens_B = ReduceSum <keepdims = 0> (token_BT, one)
    state_out_count = Add (state_in_count, tokens_B)
    count_B = Cast <to = 1> (state_in_count)
    count_B1 = Unsqueeze (count_B, one)
    place_BT = Cast <to = 1> (position_ids)
    logits = Sum (word_BT, summed_BT, half_B1, flag_B1, sums_B1, shared_11, count_B1, place_BT)
}
"""
MASKS = {
    "int64": {"MASK": f"int64[batch, time] {MASK},", "NEW": f"new_seen = Cast <to = 9> ({MASK})"},
    "bool": {"MASK": f"bool[batch, time] {MASK},", "NEW": f"new_seen = Identity ({MASK})"},
    "": {"MASK": "", "NEW": "new_seen = ConstantOfShape <value = bool[1] {1}> (shape_BT)"},
}


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def session(made: ir.Model) -> ort.InferenceSession:
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def network(masked: str, text: str = NETWORK) -> ir.Model:
    for word, line in MASKS[masked].items():
        text = text.replace(word, line)
    return model(text)


KINDS = {
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
}


def zeros(of: ort.InferenceSession, prefix: str, batch: int) -> dict[str, np.ndarray]:
    sizes = {"batch": batch}
    return {
        i.name: np.zeros([d if isinstance(d, int) else sizes.get(d, 0) for d in i.shape], KINDS[i.type])
        for i in of.get_inputs()
        if i.name.startswith(prefix)
    }


def carried(of: ort.InferenceSession, before: str, after: str, batch: int, given: list[dict[str, Any]]) -> list[Any]:
    """Chunk by chunk: all that came out."""
    state, found = zeros(of, before, batch), []
    names = [o.name for o in of.get_outputs()]
    for chunk in given:
        made = dict(zip(names, of.run(None, {**chunk, **state}), strict=True))
        found.append(made["logits"])
        state = {name: made[name.replace(before, after)] for name in state}
    return found


def with_caches(own: Any, masked: bool, heads: int) -> tuple[Any, dict[str, Any]]:
    """A network of one cache of width 3 under genai's names, and the shapes by name; caches are seen to be right."""
    assert rename_states(own, "input_ids", MASK if masked else None, PAD) == Caches(layers=1, heads=heads, width=3)
    renamed = session(own)
    there = {v.name: v.shape for v in (*renamed.get_inputs(), *renamed.get_outputs())}
    for kind in ("key", "value"):
        assert there[f"past_key_values.0.{kind}"] == ["batch", heads, "past", 3]
        assert there[f"present.0.{kind}"] == ["batch", heads, "total", 3]
    return renamed, there


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", MASKS)
def test_states_of_every_kind_are_carried_in_two_rows_beside_the_caches(masked, batch):
    own = network(masked)
    wanted_session = session(own)
    renamed, there = with_caches(own, masked, heads=1)
    for when in ("past_key_values", "present"):
        assert there[f"{when}.0.conv_state"] == ["batch", 2 + bool(masked)]  # a step, a count and how many are padding
        assert there[f"{when}.0.recurrent_state"] == ["batch", 3 + 2 + 4 + 2]
    assert there.get(MASK) == (["batch", "total"] if masked else None)
    assert_carried(wanted_session, renamed, batch)


def assert_carried(wanted: ort.InferenceSession, renamed: ort.InferenceSession, batch: int) -> None:
    """Prompts of which one is shorter, then chunks: as the first carries its own states, and as genai does."""
    masked = next((KINDS[i.type] for i in wanted.get_inputs() if i.name == MASK), None)
    ids_BS = np.random.default_rng(0).integers(0, PAD, (batch, sum(CHUNKS)))
    seen_BS = np.ones_like(ids_BS)
    if masked and batch > 1:
        ids_BS[1, :2], seen_BS[1, :2] = PAD, 0  # of which genai's mask tells nothing
        ids_BS[2, 2] = PAD  # but a word like any other further on
    place_BS = (seen_BS.cumsum(1) - 1).clip(0)
    ends = np.cumsum(CHUNKS)
    theirs, ours = [], []
    for start, end in zip(ends - CHUNKS, ends, strict=True):
        chunk = {"input_ids": ids_BS[:, start:end], "position_ids": place_BS[:, start:end]}
        theirs.append({**chunk, **({MASK: seen_BS[:, start:end].astype(masked)} if masked else {})})
        whole = {MASK: np.ones((batch, end), np.int64), "position_ids": place_BS[:, start:end] + 50} if masked else {}
        ours.append({**chunk, **whole})  # without a mask positions are as they come
    known = carried(wanted, "state_in_", "state_out_", batch, theirs)
    for one, other in zip(carried(renamed, "past_key_values", "present", batch, ours), known, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


# An attention that keeps what its window of W needs of the past, in the order of inputs that exports write
WINDOW = """
<ir_version: 10, opset_import: ["" : 18, "own" : 1]>
agraph (int64[batch, time] position_ids, MASK int64[batch, time] input_ids, float[batch, 2, past_of_W, 3] state_in_key,
        float[batch, 2, past_of_W, 3] state_in_value, bool[batch, past_of_W] state_in_seen)
    => (float[batch] logits, float[batch, 2, kept, 3] state_out_key, float[batch, 2, kept, 3] state_out_value,
        bool[batch, kept] state_out_seen)
{
    one = Constant <value = int64[1] {1}> ()
    ends = Constant <value = int64[2] {1, 3}> ()
    heads = Constant <value = float[1, 2, 1, 3] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}> ()
    word_BT = Cast <to = 1> (input_ids)
    word_B1T1 = Unsqueeze (word_BT, ends)
    key = Mul (word_B1T1, heads)
    value = Sub (key, heads)
    shape_BT = Shape (input_ids)
    NEW
    seen = Concat <axis = 1> (state_in_seen, new_seen)
    begin = Constant <value = int64[1] {BEGIN}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    state_out_seen = Slice (seen, begin, end, one)
    logits, state_out_key, state_out_value = own.Attention (word_BT, key, value, seen, state_in_key, state_in_value)
}
<domain: "own", opset_import: ["" : 18]>
Attention (query, key, value, seen, past_key, past_value) => (y, next_key, next_value)
{
    keys = Concat <axis = 2> (past_key, key)
    values = Concat <axis = 2> (past_value, value)
    ends = Constant <value = int64[2] {1, 3}> ()
    is_seen = Cast <to = 1> (seen)
    is_seen_B1S1 = Unsqueeze (is_seen, ends)
    seen_keys = Mul (keys, is_seen_B1S1)
    both = Mul (seen_keys, values)
    all = Constant <value = int64[3] {1, 2, 3}> ()
    y = ReduceSum <keepdims = 0> (both, all)
    axis = Constant <value = int64[1] {2}> ()
    begin = Constant <value = int64[1] {BEGIN}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    next_key = Slice (keys, begin, end, axis)
    next_value = Slice (values, begin, end, axis)
}
"""


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("masked", MASKS)
def test_of_a_window_the_cache_of_all_steps_is_carried_and_its_end_read(masked, window):
    begin = 1 - window if window > 1 else 2**63 - 1
    text = WINDOW.replace("past_of_W", f"past_of_{window}").replace("BEGIN", str(begin))
    own = network(masked, text)
    wanted = session(own)
    renamed, _ = with_caches(own, masked, heads=2)
    assert_carried(wanted, renamed, 3)


def test_a_network_that_remembers_no_step_has_rows_alone():
    made = model("""
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[batch, time] input_ids, float[batch, 2] state_in_h) => (float[batch, 2] y, float[batch, 2] state_out_h)
{
    y = Identity (state_in_h)
    state_out_h = Add (y, y)
}
""")
    assert rename_states(made, "input_ids", None, PAD) == Caches(layers=0, heads=1, width=1)
    assert [v.name for v in made.graph.inputs] == [
        "input_ids",
        "past_key_values.0.conv_state",
        "past_key_values.0.recurrent_state",
    ]
    assert [v.name for v in made.graph.outputs] == ["y", "present.0.conv_state", "present.0.recurrent_state"]
    given = {
        "input_ids": np.zeros((2, 1), np.float32),
        "past_key_values.0.conv_state": np.full((2, 1), 9),
        "past_key_values.0.recurrent_state": np.array([[1, 2], [3, 4]], np.float32),
    }
    y, nothing, doubled = session(made).run(None, given)
    np.testing.assert_array_equal(y, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(nothing, [[9], [9]])
    np.testing.assert_array_equal(doubled, [[2, 4], [6, 8]])


def test_caches_are_pairs_in_the_order_of_their_layers():
    shape = "float[batch, 2, past, 4]"
    names = ("a_key", "a_value", "b_key", "b_value")
    made = model(f"""
<ir_version: 10, opset_import: ["" : 18]>
agraph (int64[batch, time] input_ids, {", ".join(f"{shape} state_in_{n}" for n in names)})
    => ({", ".join(f"{shape} state_out_{n}" for n in names)})
{{
    {"".join(f"state_out_{n} = Identity (state_in_{n})" + chr(10) for n in names)}
}}
""")
    assert rename_states(made, "input_ids", None, PAD) == Caches(layers=2, heads=2, width=4)
    told = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert [v.name for v in made.graph.inputs] == ["input_ids", *(f"past_key_values.{n}" for n in told)]
    assert [v.name for v in made.graph.outputs] == [f"present.{n}" for n in told]


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (
            ["batch, 2, past, 8", "batch, 2, past, 4"],
            r"attention 0: expected keys and values of one shape, found \['batch', 2, 'past', 4\] and",
        ),
        (
            ["batch, 2, past, 8"] * 2 + ["batch, 4, past, 8"] * 2,
            "in all attentions that are kept, found heads: 2 of width 8 and 4 of width 8",
        ),
        (["batch, past, 5"], "state_in_0: expected a latent of an even width, .* found 5"),
        (["batch, 2, past_of_4, 8"], r"state_in_0: expected a cache that an attention reads, found .* behind Identity"),
    ],
)
def test_what_genai_can_not_carry_is_refused(shapes, told):
    made = model(f"""
<ir_version: 10, opset_import: ["" : 18]>
agraph (int64[batch, time] input_ids, {", ".join(f"float[{s}] state_in_{k}" for k, s in enumerate(shapes))})
    => ({", ".join(f"float[{s.replace('past', 'total')}] state_out_{k}" for k, s in enumerate(shapes))})
{{
    {"".join(f"state_out_{k} = Identity (state_in_{k})" + chr(10) for k in range(len(shapes)))}
}}
""")
    with pytest.raises(ExportError, match=rf"^genai: .*{told}.*runtime='onnxruntime'\.$"):
        rename_states(made, "input_ids", None, PAD)
