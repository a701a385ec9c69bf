"""Held tokens at one step of one layer: who stays was chosen before, see who_stays.py.

B batch, H heads, G heads of keys and values, R = H / G, C width of queries and keys, K width of values, X = C + K + 2
columns of a row, W window, M places before it, N = M + W rows, S = N - 1 of those before that go on
"""

from __future__ import annotations

from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import Reference, Text


def one_step(s: Shape) -> list[str]:
    """T = 1: the rows that go on, the step's own behind them, and one softmax over both. Nothing is sorted. The state
    is copied twice, where rows are taken and where one is added; scores fall in place.
    """
    t = Text("s")
    H, G, C, K = s[:4]
    X = s.columns
    rows = t("stay_BGSX", "GatherND", "before", "from", batch_dims=2)
    if s.fade:
        rows = t("now_BGSX", "ScatterElements", rows, "at", "score", axis=3)
    t.reshape("row_BG1X", "row_BTGX", 0, G, 1, X)
    t("held_step", "Concat", rows, "row_BG1X", axis=2)
    t.reshape("query_BGRC", "query_BTHC", 0, G, H // G, C)
    t("query_BGRX", "Pad", "query_BGRC", t.ints(0, 0, 0, 0, 0, 0, 0, X - C))
    t("scores", "com.microsoft.FusedMatMul", "query_BGRX", "held_step", transB=1, alpha=Reference("@scale"))
    t("logits", "Add", "scores", "seen")
    t("weights", "Softmax", "logits", axis=-1)
    t("mean_BGRX", "MatMul", "weights", "held_step")
    t.slice("mean_BGRK", "mean_BGRX", C + 1, C + 1 + K, 3)
    t.reshape("mean_step", "mean_BGRK", 0, 1, H * K)
    return t.lines
