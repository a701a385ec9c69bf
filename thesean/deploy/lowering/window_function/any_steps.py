"""A window at any number of steps: what `Window.forward` computes, its two cores as they are written elsewhere.

B batch, T time, S = W + T, W window, N sinks, M = N + W, H heads, G heads of keys and values, R = H / G, C width of
queries and keys, K width of values, k = K + 1, X = C + k, F = 2C features
"""

from __future__ import annotations

from thesean.deploy.lowering.forms import window_attention
from thesean.deploy.lowering.text import END, Reference, Text
from thesean.deploy.lowering.value_blocks import value_blocks
from thesean.deploy.lowering.window_function.shape import Shape
from thesean.deploy.lowering.window_function.turned import turn


def any_steps(s: Shape) -> list[str]:
    """Any T: `Window.forward` line by line, its two cores as they are written elsewhere."""
    t = Text("c")
    H, G, C, K, W, N = s[:6]
    k = K + 1
    t("time", "Shape", "query_BTE", start=1, end=2)
    t.reshape("query_BTHC", "query_BTE", 0, 0, H, C)
    t.reshape("new_BTGX", "new_BTX", 0, 0, G, C + k)
    t.split(("map_query", "map_key"), "map_ICF", (H, G), 0)
    t("held_BMGX", "Transpose", "held", perm=[0, 2, 1, 3])
    t.split(("first_BNGX", "past_BWGX"), "held_BMGX", (N, W), 1)
    t("all_BSGX", "Concat", "past_BWGX", "new_BTGX", axis=1)
    t("left_BTGX", "Slice", "all_BSGX", t.ints(0), "time", t.ints(1))
    t.slice("kept_BWGX", "all_BSGX", -W, END, 1)
    t.split(("key_BSGC", "value_BSGk"), "all_BSGX", (C, k), 3)
    t.split(("left_key", "left_value"), "left_BTGX", (C, k), 3)
    value, kept = ("rest", "kept_BMGX") if N else ("left_value", "kept_BWGX")
    if N:
        _take(t, s)
        t("kept_BMGX", "Concat", "firsts_BNGX", "kept_BWGX", axis=1)
    t("held_chunk", "Transpose", kept, perm=[0, 2, 1, 3])
    for name, x, heads in (("query", "query_BTHC", H), ("key", "left_key", G)):
        t(f"{name}_by_head", "Transpose", x, perm=[0, 2, 1, 3])
        t(f"{name}_mapped", "MatMul", f"{name}_by_head", f"map_{name}")
        t(f"{name}_phi", "Softmax", f"{name}_mapped", axis=-1)
        t(f"{name}_by_step", "Transpose", f"{name}_phi", perm=[0, 2, 1, 3])
        if -2 * C % 16:
            t(f"{name}_wide", "Pad", f"{name}_by_step", t.ints(0, 0, 0, 0, 0, 0, 0, -2 * C % 16))
        t.reshape(
            f"{name}_BTx", f"{name}_wide" if -2 * C % 16 else f"{name}_by_step", 0, 0, heads * (2 * C + -2 * C % 16)
        )
    _linear(t, s, value)
    t("scale", "Constant", value_float=Reference("@scale"))
    t("scaled_BTHC", "Mul", "query_BTHC", "scale")
    older, gate = _sinks(t, s) if N else ("older_BTHk", "gate_H")
    query, key = "scaled_BTHC", "key_BSGC"
    if s.turned:
        query, key = _turned(t, s)
    bias = ["bias_HW"] if s.biased else []
    name = window_attention.BIASED if s.biased else window_attention.NAME
    t("mean_BTHK", f"{window_attention.DOMAIN}.{name}", query, key, "value_BSGk", older, gate, *bias)
    t.reshape("mean_chunk", "mean_BTHK", 0, 0, H * K)
    return t.lines


def _take(t: Text, s: Shape) -> None:
    """`Sinks.take`, its counts in floats."""
    G, N, X = s.groups, s.sinks, s.key + s.value + 1
    ends = t.ints(0, X - 1), t.ints(1, X), t.ints(2, 3)
    for name in ("left_BTGX", "first_BNGX"):
        t(f"{name}_token", "Slice", name, *ends)
        t(f"{name}_flag", "Squeeze", f"{name}_token", t.ints(3))
    t("before_B11", "ReduceSum", "first_BNGX_flag", t.ints(1), keepdims=1)
    t("came_BT1", "CumSum", "left_BTGX_flag", t.constant("value_int = 1"))
    t("count_BT1", "Add", "before_B11", "came_BT1")
    t("own_BT1", "Mul", "count_BT1", "left_BTGX_flag")
    places = t.floats(*range(1, N + 1))
    t("at_BTN", "Equal", "own_BT1", places)
    t("taken_BTN", "Cast", "at_BTN", to=1)
    t("taken_BNT", "Transpose", "taken_BTN", perm=[0, 2, 1])
    t.reshape("left_BTx", "left_BTGX", 0, 0, G * X)
    t("taken_BNx", "MatMul", "taken_BNT", "left_BTx")
    t.reshape("taken_BNGX", "taken_BNx", 0, N, G, X)
    t("firsts_BNGX", "Add", "first_BNGX", "taken_BNGX")
    t("past_BT1", "Greater", "count_BT1", t.floats(N))
    t("full_BT1", "Cast", "past_BT1", to=1)
    t("full_BT11", "Unsqueeze", "full_BT1", t.ints(3))
    t("rest", "Mul", "left_value", "full_BT11")


def _linear(t: Text, s: Shape, value: str) -> None:
    """`linear_attention_operator`: older_BTHk and the state after it."""
    H, G, C, K = s[:4]
    missing, blocks = -2 * C % 16, value_blocks(K + 1)
    widths = tuple(width for width, _ in blocks)
    names = [f"b{i}" for i in range(len(blocks))]
    t.split(tuple(f"value_{n}" for n in names), value, widths, 3)
    t.split(tuple(f"linear_{n}" for n in names), "linear", widths, 3)
    for n, (width, padded) in zip(names, blocks, strict=True):
        given, state, more = f"value_{n}", f"linear_{n}", padded - width
        if more or missing:
            given = t(f"value_{n}_wide", "Pad", given, t.ints(0, 0, 0, 0, 0, 0, 0, more))
            state = t(f"linear_{n}_wide", "Pad", state, t.ints(0, 0, 0, 0, 0, 0, missing, more))
        t.reshape(f"value_{n}_x", given, 0, 0, G * padded)
        t(f"out_{n}_x, state_{n}", "com.microsoft.LinearAttention", "query_BTx", "key_BTx", f"value_{n}_x", state,
          "log_decay_BTG", q_num_heads=H, kv_num_heads=G, scale=1.0, update_rule='"gated"')  # fmt: skip
        t.reshape(f"out_{n}", f"out_{n}_x", 0, 0, H, padded)
        if more or missing:
            t.slice(f"out_{n}_narrow", f"out_{n}", 0, width, 3)
            t(f"state_{n}_narrow", "Slice", f"state_{n}", t.ints(0, 0), t.ints(2 * C, width), t.ints(2, 3))
    parts = [(f"out_{n}", f"state_{n}") for n in names]
    parts = [
        (f"{o}_narrow", f"{z}_narrow") if padded > width or missing else (o, z)
        for (o, z), (width, padded) in zip(parts, blocks, strict=True)
    ]
    many = {"axis": 3} if len(parts) > 1 else {}
    t("older_BTHk", "Concat" if many else "Identity", *(o for o, _ in parts), **many)
    t("linear_chunk", "Concat" if many else "Identity", *(z for _, z in parts), **many)


def _sinks(t: Text, s: Shape) -> tuple[str, str]:
    """`Sinks.scores` and `add_sinks`: (sums of older tokens and sinks, their scale)."""
    C, K, N = s.key, s.value, s.sinks
    query = "scaled_BTHC"
    t.split(("first_key", "first_value"), "firsts_BNGX", (C, K + 1), 3)
    key = "first_key"
    if s.turned:
        tables = [t.slice(f"{n}_NC", f"{n}_MC", 0, N, 0) for n in ("cos", "sin")]
        cos, sin = (
            t(f"{n}_N1C", "Unsqueeze", table, t.ints(1)) for n, table in zip(("cos", "sin"), tables, strict=True)
        )
        key = turn(t, "first", key, (cos, sin), s)
    t("key_BGCN", "Transpose", key, perm=[0, 2, 3, 1])
    t("value_BGNk", "Transpose", "first_value", perm=[0, 2, 1, 3])
    t("product_BGxN", "MatMul", _by_group(t, "asked_by_group", query, s, C), "key_BGCN")
    scores = _by_step(t, "sink_scores", "product_BGxN", s, N)
    if s.biased:
        scores = t("sink_biased", "Add", scores, t.slice("bias_HN", "bias_HM", 0, N, 1))
    t("empty_BTN", "Less", "count_BT1", t.floats(*range(1, N + 1)))
    t("empty_BT1N", "Unsqueeze", "empty_BTN", t.ints(2))
    t("seen_BTHN", "Where", "empty_BT1N", t.constant("value = float {-inf}"), scores)
    t("peak_BTH", "ReduceMax", "seen_BTHN", t.ints(-1), keepdims=0)
    t("top_BTH", "Max", "peak_BTH", "gate_H")
    t("top_BTH1", "Unsqueeze", "top_BTH", t.ints(3))
    t("below_BTHN", "Sub", "seen_BTHN", "top_BTH1")
    t("weights_BTHN", "Exp", "below_BTHN")
    t("sums_BGxk", "MatMul", _by_group(t, "weights_by_group", "weights_BTHN", s, N), "value_BGNk")
    sums = _by_step(t, "sink_sums", "sums_BGxk", s, K + 1)
    t("gate_below", "Sub", "gate_H", "top_BTH")
    t("gate_weight", "Exp", "gate_below")
    t("gate_BTH1", "Unsqueeze", "gate_weight", t.ints(3))
    t("older_share", "Mul", "older_BTHk", "gate_BTH1")
    return t("older_with_sinks", "Add", sums, "older_share"), "top_BTH"


def _by_group(t: Text, name: str, x: str, s: Shape, width: int) -> str:
    """(B, T, H, width) -> (B, G, T R, width)."""
    if s.heads == s.groups:
        return t(name, "Transpose", x, perm=[0, 2, 1, 3])
    t.reshape(f"{name}_apart", x, 0, 0, s.groups, -1, width)
    t(f"{name}_turned", "Transpose", f"{name}_apart", perm=[0, 2, 1, 3, 4])
    return t.reshape(name, f"{name}_turned", 0, s.groups, -1, width)


def _by_step(t: Text, name: str, x: str, s: Shape, width: int) -> str:
    """The inverse."""
    if s.heads == s.groups:
        return t(name, "Transpose", x, perm=[0, 2, 1, 3])
    t.reshape(f"{name}_apart", x, 0, s.groups, -1, s.heads // s.groups, width)
    t(f"{name}_turned", "Transpose", f"{name}_apart", perm=[0, 2, 1, 3, 4])
    return t.reshape(name, f"{name}_turned", 0, 0, s.heads, width)


def _turned(t: Text, s: Shape) -> tuple[str, str]:
    """Queries and keys of the window, as `Rotate` turns them: counted from its first row."""
    t("spans", "Shape", "all_BSGX", start=1, end=2)
    t("S", "Squeeze", "spans")
    t("row_S", "Range", t.constant("value_int = 0"), "S", t.constant("value_int = 1"))
    t("step_S", "Cast", "row_S", to=1)
    t("step_S1", "Unsqueeze", "step_S", t.ints(1))
    t("turns_SC", "Mul", "step_S1", "leading_C")
    t("whole_SC", "Floor", "turns_SC")
    t("part_SC", "Sub", "turns_SC", "whole_SC")
    t("more_SC", "Mul", "step_S1", "rest_C")
    t("turn_SC", "Add", "part_SC", "more_SC")
    t("angle_SC", "Mul", "turn_SC", t.constant("value_float = 6.28318531"))
    t("cos_SC", "Cos", "angle_SC")
    t("sine_SC", "Sin", "angle_SC")
    t("sin_SC", "Mul", "sine_SC", "sign_C")
    for name in ("cos", "sin"):
        t(f"{name}_S1C", "Unsqueeze", f"{name}_SC", t.ints(1))
        t.slice(f"{name}_T1C", f"{name}_S1C", s.window, END, 0)
    query = turn(t, "windowed", "scaled_BTHC", ("cos_T1C", "sin_T1C"), s)
    return query, turn(t, "keys", "key_BSGC", ("cos_S1C", "sin_S1C"), s)
