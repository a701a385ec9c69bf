"""Held tokens at any number of steps, a block of them after the other: what `Held.forward` computes, in one softmax
over what was kept and the window.

Who is kept hangs on scores alone, so that it is known for all steps of a block at once; see block.py.

B batch, T time, S = W + T, W window, M places before it, N = M + W, Q blocks of L steps, H heads, G heads of keys and
values, R = H / G, C width of queries and keys, K width of values, X = C + K + 2: a token's key, score, value and a 1
"""

from __future__ import annotations

from thesean.deploy.lowering.held_function.block import around, block
from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import END, Reference, Text
from thesean.kernels.kept_attention import BLOCK


def in_blocks(s: Shape) -> list[str]:
    """Any T, after any state; `steps` of around it is T."""
    t = Text("c")
    G, W, M, L = s.groups, s.window, s.places, BLOCK
    H, R, C, K, N = s.heads, s.heads // s.groups, s.key, s.value, s.all_places
    t("short", "Neg", "steps")
    t("missing", "Mod", "short", t.ints(L))
    t("pads", "Concat", t.ints(0), "missing", axis=0)
    _in_order(t, s)
    t.split(("kept_BGMX", "past_BGWX"), "before_BGNX", (M, W), 2)
    t("score_BTG1", "Unsqueeze", "score_BTG", t.ints(3))
    t("value_BTGk", "Pad", "value_BTGK", t.ints(0, 0, 0, 0, 0, 0, 0, 1), t.number(1.0))
    t("row_BTGX", "Concat", "key_BTGC", "score_BTG1", "value_BTGk", axis=3)
    t("row_BGTX", "Transpose", "row_BTGX", perm=[0, 2, 1, 3])
    t("all_BGSX", "Concat", "past_BGWX", "row_BGTX", axis=2)
    # rows that fill the last block up hold no token
    t("filled_BGsX", "Pad", "all_BGSX", "pads", t.number(0.0), t.ints(2))
    t.slice("left_BGtX", "filled_BGsX", 0, -W, 2)
    t.reshape("left_BGQLX", "left_BGtX", 0, G, -1, L, s.columns)
    t("left_QBGLX", "Transpose", "left_BGQLX", perm=[2, 0, 1, 3, 4])
    t("filled", "Shape", "left_BGtX", start=2, end=3)
    t("end", "Squeeze", "filled")
    t("begin_Q", "Range", t.constant("value_int = 0"), "end", t.constant(f"value_int = {L}"))
    t.reshape("begin_Q1", "begin_Q", -1, 1)
    t("ahead_QW", "Add", "begin_Q1", t.ints(*range(L, L + W)))
    t("ahead_BGQWX", "Gather", "filled_BGsX", "ahead_QW", axis=2)
    t("ahead_QBGWX", "Transpose", "ahead_BGQWX", perm=[2, 0, 1, 3, 4])
    t("to_come_Q1", "Sub", "steps", "begin_Q1")
    t("steps_Q1", "Min", "to_come_Q1", t.ints(L))
    t("last_Q1", "Sub", "steps_Q1", t.ints(1))
    t("scale", "Constant", value_float=Reference("@scale"))
    t("scaled_BTHC", "Mul", "query_BTHC", "scale")
    t("filled_BtHC", "Pad", "scaled_BTHC", "pads", t.number(0.0), t.ints(1))
    t.reshape("query_BQLGRC", "filled_BtHC", 0, -1, L, G, R, C)
    t("query_QBGRLC", "Transpose", "query_BQLGRC", perm=[1, 0, 3, 4, 2, 5])
    t.reshape("query_QBGxC", "query_QBGRLC", 0, 0, G, R * L, C)
    t.lines.extend(around(s, L))
    t.lines.append(f"""held_BGMX, mean_QBGxK = Scan <num_scan_inputs = 4, body = block (
        float[B, G, M, X] kept, float[B, G, x, C] query, float[B, G, L, X] left, float[B, G, W, X] ahead,
        int64[one] last)
        => (float[B, G, M, X] held, float[B, G, x, K] mean)
        {{
            {chr(10).join(block(s, L))}
        }}> (kept_BGMX, query_QBGxC, left_QBGLX, ahead_QBGWX, last_Q1)""")
    t.reshape("mean_QBGRLK", "mean_QBGxK", 0, 0, G, R, L, K)
    t("mean_BQLGRK", "Transpose", "mean_QBGRLK", perm=[1, 0, 4, 2, 3, 5])
    t.reshape("mean_BtE", "mean_BQLGRK", 0, -1, H * K)
    t("mean_blocks", "Slice", "mean_BtE", t.ints(0), "steps", t.ints(1))
    t.slice("last_BGWX", "all_BGSX", -W, END, 2)
    t("held_BGNX", "Concat", "held_BGMX", "last_BGWX", axis=2)
    t.split(("keys_blocks", "told_BGN1", "values_blocks", "holds_BGN1"), "held_BGNX", (C, 1, K, 1), 3)
    for name in ("told", "holds"):
        t.reshape(f"{name}_BG1N", f"{name}_BGN1", 0, G, 1, N)
    t("time_BG1N", "Mul", "holds_BG1N", t.floats(*[1] * M, *range(2, W + 2)))
    t("marks_blocks", "Concat", "time_BG1N", "told_BG1N", axis=2)
    return t.lines


def _in_order(t: Text, s: Shape) -> None:
    """before_BGNX: none first, then those that are kept, then the window from its oldest token on."""
    G, N = s.groups, s.all_places
    t.split(("when_BG1N", "was_BG1N"), "marks_before", (1, 1), 2)
    t("apart_BG1N", "Mul", "when_BG1N", t.number(N))
    t("rank_BG1N", "Add", "apart_BG1N", t.floats(*range(N)))
    t("_, order_BG1N", "TopK", "rank_BG1N", t.ints(N), axis=3, largest=0)
    t.reshape("order_BGN1", "order_BG1N", 0, G, N, 1)
    t("token_BG1N", "Clip", "when_BG1N", t.number(0.0), t.number(1.0))
    for name in ("was", "token"):
        t.reshape(f"{name}_BGN1", f"{name}_BG1N", 0, G, N, 1)
    t("rows_BGNX", "Concat", "keys", "was_BGN1", "values", "token_BGN1", axis=3)
    t("before_BGNX", "GatherND", "rows_BGNX", "order_BGN1", batch_dims=2)
