"""A window at one step: nothing is in blocks or transposed, sinks and window are one tensor and one softmax.

B batch, T time, S = W + T, W window, N sinks, M = N + W, H heads, G heads of keys and values, R = H / G, C width of
queries and keys, K width of values, k = K + 1, X = C + k, F = 2C features
"""

from __future__ import annotations

import torch

from thesean.deploy.lowering.text import Reference, Text
from thesean.deploy.lowering.window_function.shape import Shape
from thesean.deploy.lowering.window_function.turned import partner


def one_step(s: Shape) -> list[str]:
    """T = 1. Sinks and window in one: in distances, a sink stands right before the window as it does there."""
    t = Text("s")
    H, G, C, K, W, N = s[:6]
    R, k, X, M = H // G, K + 1, C + K + 1, W + N
    t.reshape("new_BG1X", "new_BTX", 0, G, 1, X)
    t.split(("first", "left", "stay"), "held", (N, 1, W - 1), 2)
    t.split(("left_key", "left_value"), "left", (C, k), 3)
    rest, kept = "left_value", [*(["stay"] if W > 1 else []), "new_BG1X"]
    if N:
        # a place is the first that is free where the one before is taken and it is not
        ends = t.ints(0, X - 1), t.ints(1, X), t.ints(1, 3)
        t("taken_B1N1", "Slice", "first", *ends)
        one = t.constant("value_float = 1.0")
        t("before_B1N1", "Pad", "taken_B1N1", t.ints(0, 0, 1, 0, 0, 0, -1, 0), one)
        t("place_B1N1", "Sub", "before_B1N1", "taken_B1N1")
        t("came_BGNX", "Mul", "place_B1N1", "left")
        t("firsts", "Add", "first", "came_BGNX")
        t.slice("full_B111", "taken_B1N1", N - 1, N, 2)
        rest = t("rest_BG1k", "Mul", "left_value", "full_B111")
        kept = ["firsts", *kept]
    t("held_step", "Concat" if len(kept) > 1 else "Identity", *kept, **({"axis": 2} if len(kept) > 1 else {}))

    # what is older: the linear state after the token that left, and the query's own sum over it
    t.reshape("query_BH1C", "query_BTE", 0, H, 1, C)
    t("both", "Concat", "query_BH1C", "left_key", axis=1)
    t("mapped", "MatMul", "both", "map_ICF")
    t("phi", "Softmax", "mapped", axis=-1)
    t.split(("phi_query", "phi_key"), "phi", (H, G), 1)
    t.reshape("log_decay", "log_decay_BTG", 0, G, 1, 1)
    t("decay", "Exp", "log_decay")
    t("entered", "com.microsoft.FusedMatMul", "phi_key", rest, transA=1)
    t("faded", "Mul", "linear", "decay")
    t("linear_step", "Add", "faded", "entered")
    own = "phi_query" if R == 1 else t.reshape("phi_query_BGRF", "phi_query", 0, G, R, 2 * C)
    t("older_BGRk", "MatMul", own, "linear_step")
    t.split(("older_BGRK", "weight_BGR1"), "older_BGRk", (K, 1), 3)
    t("log_weight", "Log", "weight_BGR1")
    t("gate", "Add", "log_weight", t.reshape("gate_GR1", "gate_H", G, R, 1))

    own = "query_BH1C" if R == 1 else t.reshape("query_BGRC", "query_BTE", 0, G, R, C)
    product = {"transB": 1, "alpha": Reference("@scale")}
    if s.turned:
        # q.(k cos + partner(k) sin) = q.(k cos) + partner(q).(k partner(sin)): only the query is put in another order
        t.slice("key_BGMC", "held_step", 0, C, 3)
        t("key_cos", "Mul", "key_BGMC", "cos_MC")
        t("key_sin", "Mul", "key_BGMC", "partner_sin_MC")
        turned = partner(t, "query_partner", own, s)
        t("scores_cos", "com.microsoft.FusedMatMul", own, "key_cos", **product)
        t("scores_sin", "com.microsoft.FusedMatMul", turned, "key_sin", **product)
        scores = t("scores", "Add", "scores_cos", "scores_sin")
    else:
        own = t("query_BGRX", "Pad", own, t.ints(0, 0, 0, 0, 0, 0, 0, k))
        scores = t("scores", "com.microsoft.FusedMatMul", own, "held_step", **product)
    t("token_B1M1", "Slice", "held_step", t.ints(0, X - 1), t.ints(1, X), t.ints(1, 3))
    t.reshape("token_B11M", "token_B1M1", 0, 1, 1, M)
    t("seen_B11M", "Log", "token_B11M")
    scores = t("seen_scores", "Add", scores, "seen_B11M")
    if s.biased:
        scores = t("biased", "Add", scores, t.reshape("bias_GRM", "bias_HM", G, R, M))
    t("logits", "Concat", scores, "gate", axis=3)
    t("weights", "Softmax", "logits", axis=-1)
    t.split(("near", "old"), "weights", (M, 1), 3)
    t("near_BGRX", "MatMul", "near", "held_step")
    t.slice("near_BGRK", "near_BGRX", C, C + K, 3)
    t("some_weight", "Max", "weight_BGR1", t.constant(f"value_float = {torch.finfo(torch.float32).tiny:.9g}"))
    t("mean_old", "Div", "older_BGRK", "some_weight")
    t("share_old", "Mul", "mean_old", "old")
    t("mean_BGRK", "Add", "near_BGRK", "share_old")
    t.reshape("mean_step", "mean_BGRK", 0, 1, H * K)
    return t.lines
