"""Held tokens where nothing was held before and all that come find a place: attention over a text from its beginning.

With all places taken, those that were kept fade in the last step, as in any other.

B batch, T <= N steps, W window, M places before it, N = M + W, H heads, G heads of keys and values, R = H / G, x = R T,
C width of queries and keys, K width of values
"""

from __future__ import annotations

from thesean.deploy.lowering.held_function.block import FAR
from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import END, Reference, Text
from thesean.kernels.kept_attention import LASTING


def all_kept(s: Shape) -> list[str]:
    """The tokens stand in the last places, in the order in which they came; `steps` of around it is T."""
    t = Text("w")
    G, R, C, K, N = s.groups, s.heads // s.groups, s.key, s.value, s.all_places
    t("room", "Sub", t.ints(N), "steps")
    t("front", "Concat", "room", t.ints(0), axis=0)
    t("key_BGTC", "Transpose", "key_BTGC", perm=[0, 2, 1, 3])
    t("value_BGTK", "Transpose", "value_BTGK", perm=[0, 2, 1, 3])
    for name, made in (("key_BGTC", "keys_whole"), ("value_BGTK", "values_whole")):
        t(made, "Pad", name, "front", t.number(0.0), t.ints(2))
    _marked(t, s)
    t("mask_BGTT", "Add", _to_come(t), _faded(t, s))

    t.reshape("query_BTGRC", "query_BTHC", 0, 0, G, R, C)
    t("query_BGRTC", "Transpose", "query_BTGRC", perm=[0, 2, 3, 1, 4])
    t.reshape("query_BGxC", "query_BGRTC", 0, G, -1, C)
    scores = t(
        "scores_BGxT", "com.microsoft.FusedMatMul", "query_BGxC", "key_BGTC", transB=1, alpha=Reference("@scale")
    )
    t("sizes", "Concat", t.ints(0, G, R), "steps", t.ints(-1), axis=0)
    mask = "mask_BGTT"
    if R > 1:
        scores = t("scores_BGRTT", "Reshape", scores, "sizes")
        mask = t("mask_BG1TT", "Unsqueeze", mask, t.ints(2))
    t("logits", "Add", scores, mask)
    weights = t("weights", "Softmax", "logits", axis=-1)
    if R > 1:
        t("flat", "Concat", t.ints(0, G, -1), "steps", axis=0)
        weights = t("weights_BGxT", "Reshape", weights, "flat")
    t("mean_BGxK", "MatMul", weights, "value_BGTK")
    t("mean_BGRTK", "Reshape", "mean_BGxK", "sizes")
    t("mean_BTGRK", "Transpose", "mean_BGRTK", perm=[0, 3, 1, 2, 4])
    t.reshape("mean_whole", "mean_BTGRK", 0, 0, s.heads * K)
    return t.lines


def _marked(t: Text, s: Shape) -> None:
    """marks_whole: times and scores, less by what came after those that left the window."""
    M, W, N = s.places, s.window, s.all_places
    t("room_float", "Cast", "room", to=1)
    t("beyond_N", "Sub", t.floats(*range(N)), "room_float")
    t("holds_N", "HardSigmoid", "beyond_N", alpha=1.0, beta=1.0)
    t("time_N", "Mul", "holds_N", t.floats(*[1] * M, *range(2, W + 2)))
    t("score_BGT", "Transpose", "score_BTG", perm=[0, 2, 1])
    t("score_BG1T", "Unsqueeze", "score_BGT", t.ints(2))
    told = t("told_BG1N", "Pad", "score_BG1T", "front", t.number(0.0), t.ints(3))
    t("size", "Shape", told)
    t("time_BG1N", "Expand", "time_N", "size")
    if s.fade:
        t("lost_N", "Mul", "holds_N", t.floats(*((M - 1 - n) / s.fade for n in range(M)), *[0] * W))
        t("falls_BG1N", "Less", told, t.number(LASTING))
        t("lost_BG1N", "Where", "falls_BG1N", "lost_N", t.number(0.0))
        told = t("now_BG1N", "Sub", told, "lost_BG1N")
    t("marks_whole", "Concat", "time_BG1N", told, axis=2)


def _faded(t: Text, s: Shape) -> str:
    """The logarithm of how much tokens count, 0 but of those that are kept in a last step that takes all places."""
    M = s.places
    told = "now_BG1N" if s.fade else "told_BG1N"
    t.slice("kept_BG1M", told, 0, M, 3)
    t("least_BG11", "ReduceMin", "kept_BG1M", t.ints(3), keepdims=1)
    t("above_BG1M", "Sub", "kept_BG1M", "least_BG11")
    t("free", "Mul", "room_float", t.number(FAR))
    t("clear_BG1M", "Add", "above_BG1M", "free")
    t("counts_BG1M", "Clip", "clear_BG1M", t.number(0.0), t.number(1.0))
    t("log_BG1M", "Log", "counts_BG1M")
    t("log_BG1N", "Pad", "log_BG1M", t.ints(0, s.window), t.number(0.0), t.ints(3))
    t("log_BG1T", "Slice", "log_BG1N", "room", t.ints(END), t.ints(3))
    t("one_less", "Sub", "steps", t.ints(1))
    t("above_last", "Concat", "one_less", t.ints(0), axis=0)
    return t("log_BGTT", "Pad", "log_BG1T", "above_last", t.number(0.0), t.ints(2))


def _to_come(t: Text) -> str:
    """-FAR where a token comes after the step, (T, T)."""
    t("end", "Squeeze", "steps")
    t("at_T", "Range", t.constant("value_int = 0"), "end", t.constant("value_int = 1"))
    t("place_T", "Cast", "at_T", to=1)
    t.reshape("place_T1", "place_T", -1, 1)
    t("later_TT", "Sub", "place_T", "place_T1")
    t("hidden_TT", "HardSigmoid", "later_TT", alpha=1.0, beta=0.0)
    return t("to_come_TT", "Mul", "hidden_TT", t.number(-FAR))
