"""Held tokens at any number of steps: what `Held.forward` computes, its two cores as they are written elsewhere.

B batch, T time, S = W + T, W window, M places before it, N = M + W, H heads, G heads of keys and values, C width of
queries and keys, K width of values, k = K + 1, X = C + 1 + k
"""

from __future__ import annotations

from thesean.deploy.lowering.forms import kept_attention, window_attention
from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import END, Reference, Text


def any_steps(s: Shape) -> list[str]:
    """Any T: `Held.forward` line by line; what it is told of who stays is of a step, and not read."""
    t = Text("c")
    H, _, C, K, W, M, F = s
    t("time", "Shape", "query_BTHC", start=1, end=2)
    t("scale", "Constant", value_float=Reference("@scale"))
    t("scaled_BTHC", "Mul", "query_BTHC", "scale")
    t("before_BNGX", "Transpose", "before", perm=[0, 2, 1, 3])
    t.split(("kept_BMGX", "past_BWGX"), "before_BNGX", (M, W), 1)
    t("all_BSGX", "Concat", "past_BWGX", "row_BTGX", axis=1)
    t("left_BTGX", "Slice", "all_BSGX", t.ints(0), "time", t.ints(1))
    t(
        "sums_BTHk, top_BTH, stay_BMGX",
        f"{kept_attention.DOMAIN}.{kept_attention.name_of(F)}",
        "scaled_BTHC",
        "left_BTGX",
        "kept_BMGX",
    )
    t.split(("key_BSGC", "score_BSG1", "value_BSGk"), "all_BSGX", (C, 1, K + 1), 3)
    t(
        "mean_BTHK",
        f"{window_attention.DOMAIN}.{window_attention.NAME}",
        "scaled_BTHC",
        "key_BSGC",
        "value_BSGk",
        "sums_BTHk",
        "top_BTH",
    )
    t.reshape("mean_chunk", "mean_BTHK", 0, 0, H * K)
    t.slice("last_BWGX", "all_BSGX", -W, END, 1)
    t("held_BNGX", "Concat", "stay_BMGX", "last_BWGX", axis=1)
    t("held_chunk", "Transpose", "held_BNGX", perm=[0, 2, 1, 3])
    return t.lines
