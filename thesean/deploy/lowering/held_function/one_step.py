"""Held tokens at one step of one layer: who stays was chosen before, see who_stays.py.

B batch, H heads, G heads of keys and values, R = H / G, C width of queries and keys, K width of values, N places
"""

from __future__ import annotations

from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import Reference, Text


def one_step(s: Shape) -> list[str]:
    """T = 1: the token takes its place, and one softmax over all. Nothing is sorted or moved, keys and values are each
    copied once.
    """
    t = Text("s")
    H, G, C, K = s[:4]
    t.reshape("key_BGC", "key_BTGC", 0, G, C)
    t("keys_step", "ScatterND", "keys", "slot", "key_BGC")
    t.reshape("value_BGK", "value_BTGK", 0, G, K)
    t("values_step", "ScatterND", "values", "slot", "value_BGK")
    t.reshape("score_BG11", "score_BTG", 0, G, 1, 1)
    t("marks_step", "Where", "own", "score_BG11", "marks")
    t.reshape("query_BGRC", "query_BTHC", 0, G, H // G, C)
    t("scores", "com.microsoft.FusedMatMul", "query_BGRC", "keys_step", transB=1, alpha=Reference("@scale"))
    t("logits", "Add", "scores", "seen")
    t("weights", "Softmax", "logits", axis=-1)
    t("mean_BGRK", "MatMul", "weights", "values_step")
    t.reshape("mean_step", "mean_BGRK", 0, 1, H * K)
    return t.lines
