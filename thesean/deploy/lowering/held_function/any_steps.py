"""Held tokens at any number of steps: what `Held.forward` computes, its two cores as they are written elsewhere.

B batch, T time, S = W + T, W window, M places before it, N = M + W, H heads, G heads of keys and values, C width of
queries and keys, K width of values, k = K + 1, X = C + 1 + k
"""

from __future__ import annotations

from thesean.deploy.lowering.forms import kept_attention, window_attention
from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import END, Reference, Text


def any_steps(s: Shape) -> list[str]:
    """Any T: `Held.forward` line by line, of places in order; what it is told of who stays is of one step alone."""
    t = Text("c")
    H, G, C, K, W, M, F = s
    N = s.all_places
    t("time", "Shape", "query_BTHC", start=1, end=2)
    t("scale", "Constant", value_float=Reference("@scale"))
    t("scaled_BTHC", "Mul", "query_BTHC", "scale")
    _in_order(t, s)
    t("before_BNGX", "Transpose", "before_BGNX", perm=[0, 2, 1, 3])
    t.split(("kept_BMGX", "past_BWGX"), "before_BNGX", (M, W), 1)
    t("score_BTG1", "Unsqueeze", "score_BTG", t.ints(3))
    t("value_BTGk", "Pad", "value_BTGK", t.ints(0, 0, 0, 0, 0, 0, 0, 1), t.number(1.0))
    t("row_BTGX", "Concat", "key_BTGC", "score_BTG1", "value_BTGk", axis=3)
    t("all_BSGX", "Concat", "past_BWGX", "row_BTGX", axis=1)
    t("left_BTGX", "Slice", "all_BSGX", t.ints(0), "time", t.ints(1))
    kept = f"{kept_attention.DOMAIN}.{kept_attention.name_of(F)}"
    t("sums_BTHk, top_BTH, stay_BMGX", kept, "scaled_BTHC", "left_BTGX", "kept_BMGX")
    t.split(("key_BSGC", "score_BSG1", "value_BSGk"), "all_BSGX", (C, 1, K + 1), 3)
    window = f"{window_attention.DOMAIN}.{window_attention.NAME}"
    t("mean_BTHK", window, "scaled_BTHC", "key_BSGC", "value_BSGk", "sums_BTHk", "top_BTH")
    t.reshape("mean_chunk", "mean_BTHK", 0, 0, H * K)
    t.slice("last_BWGX", "all_BSGX", -W, END, 1)
    t("held_BNGX", "Concat", "stay_BMGX", "last_BWGX", axis=1)
    t("held_BGNX", "Transpose", "held_BNGX", perm=[0, 2, 1, 3])
    t.split(("keys_chunk", "told_BGN1", "values_chunk", "holds_BGN1"), "held_BGNX", (C, 1, K, 1), 3)
    for name in ("told", "holds"):
        t.reshape(f"{name}_BG1N", f"{name}_BGN1", 0, G, 1, N)
    t("time_BG1N", "Mul", "holds_BG1N", t.floats(*[1] * M, *range(2, W + 2)))
    t("marks_chunk", "Concat", "time_BG1N", "told_BG1N", axis=2)
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
