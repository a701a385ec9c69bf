"""A block of steps over held tokens: `_block` of kernels/kept_attention.py and the window beside it, as one softmax.

What was kept and what leaves the window in these steps is sorted by score once. Who stays after a step is then a matter
of counting: those of the first M that came by then.

B batch, L steps, W window, M places before it, J = M + L of which M stay, G heads of keys and values, R queries to
each, x = R L, C width of queries and keys, K width of values, X = C + K + 2
"""

from __future__ import annotations

from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import END, Text
from thesean.kernels.kept_attention import LASTING

# what no score comes near to
FAR = 1e30


def block(s: Shape, steps: int) -> list[str]:
    """(kept_BGMX, query_BGxC, left_BGLX, ahead_BGWX, last) -> (held_BGMX, mean_BGxK). The window of step t is what is
    left of `left` after its row t, and of `ahead` up to the step's own; `last` is the last step that is one.

    What is there once, `own_LW`, comes from around the loop. Conditions are counted in floats: integers x <= n are
    HardSigmoid(n + 1 - x), and onnxruntime's Where takes thirty times as long as that.
    """
    t = Text("b")
    G, R, C, K, W, M = s.groups, s.heads // s.groups, s.key, s.value, s.window, s.places
    L, J = steps, s.places + steps
    t("rows_BGJX", "Concat", "kept", "left", axis=2)
    t("both_BGJ2", "Slice", "rows_BGJX", t.ints(C), t.ints(END), t.ints(3), t.ints(K + 1))
    t("both_BG2J", "Transpose", "both_BGJ2", perm=[0, 1, 3, 2])
    t.split(("score_BG1J", "token_BG1J"), "both_BG2J", (1, 1), 2)
    raised = _raised(t, s, L) if s.fade else "score_BG1J"
    t("class_BG1J", "Sub", "token_BG1J", t.number(1.0))
    t("apart_BG1J", "Mul", "class_BG1J", t.number(FAR))
    t("rank_BG1J", "Add", "apart_BG1J", raised)
    t("score_sorted, from_BG1J", "TopK", "rank_BG1J", t.ints(J), axis=3)  # of equals the earlier one first
    t.reshape("from_BGJ1", "from_BG1J", 0, G, J, 1)
    t("row_sorted", "GatherND", "rows_BGJX", "from_BGJ1", batch_dims=2)

    # a row that holds no token is last in order, and came before all: it is neither seen nor in the window
    t("holds_BG1J", "HardSigmoid", "score_sorted", alpha=1.0, beta=FAR / 2)
    t("number_BG1J", "Cast", "from_BG1J", to=1)
    t("next_BG1J", "Add", "number_BG1J", t.number(1.0))
    t("place_BG1J", "Mul", "next_BG1J", "holds_BG1J")
    # steps last, for sums over tokens in order are quick along any dimension but the last
    t.reshape("place_BGJ1", "place_BG1J", 0, G, J, 1)
    t("later_BGJL", "Sub", "place_BGJ1", t.floats(*range(M + 1, M + L + 1)))  # by how many steps a token comes later
    t("came_BGJL", "HardSigmoid", "later_BGJL", alpha=-1.0, beta=1.0)
    t("better_BGJL", "CumSum", "came_BGJL", t.constant("value_int = 2"), exclusive=1)
    # 1 up to the last one that stays, 0 from there on
    t("few_BGJL", "HardSigmoid", "better_BGJL", alpha=-1.0, beta=float(M))
    t("up_to_BG1L", "ReduceSum", "few_BGJL", t.ints(2), keepdims=1)
    t("least_BG1L", "Sub", "up_to_BG1L", t.number(1.0))
    t("least_at", "Cast", "least_BG1L", to=7)
    t("limit_BG1L", "GatherElements", "score_sorted", "least_at", axis=3)
    t.reshape("limit_BGL1", "limit_BG1L", 0, G, L, 1)
    # what stays counts by how far it is above the least that does, what is in the window whole
    t("above_BGLJ", "Sub", "score_sorted", "limit_BGL1")
    t.reshape("row_L1", t.floats(*range(M + 1, M + L + 1)), L, 1)
    t("after_BGLJ", "Sub", "place_BG1J", "row_L1")
    counts = t("seen_BGLJ", "Max", "above_BGLJ", "after_BGLJ")
    if W < L:
        t.reshape("end_L1", t.floats(*range(M + W + 2, M + W + L + 2)), L, 1)
        t("yet_BGLJ", "Sub", "end_L1", "place_BG1J")
        counts = t("inside_BGLJ", "Min", counts, "yet_BGLJ")
    t("count_BGLJ", "Clip", counts, t.number(0.0), t.number(1.0))
    t("log_BGLJ", "Log", "count_BGLJ")
    t.slice("token_BGW1", "ahead", s.columns - 1, s.columns, 3)
    t.reshape("token_BG1W", "token_BGW1", 0, G, 1, W)
    t("log_token", "Log", "token_BG1W")
    t("log_BGLW", "Add", "log_token", "own_LW")
    mask = t("log_BGLv", "Concat", "log_BGLJ", "log_BGLW", axis=3)
    t("row_BGvX", "Concat", "row_sorted", "ahead", axis=2)
    t.slice("key_BGvC", "row_BGvX", 0, C, 3)
    t.slice("value_BGvK", "row_BGvX", C + 1, C + 1 + K, 3)
    scores = t("scores_BGxv", "com.microsoft.FusedMatMul", "query", "key_BGvC", transB=1)
    if R > 1:
        scores = t.reshape("scores_BGRLv", scores, 0, G, R, L, J + W)
        mask = t("log_BG1Lv", "Unsqueeze", mask, t.ints(2))
    t("logits", "Add", scores, mask)
    weights = t("weights", "Softmax", "logits", axis=-1)
    if R > 1:
        weights = t.reshape("weights_BGxv", weights, 0, G, R * L, J + W)
    t("mean", "MatMul", weights, "value_BGvK")

    t("came_BGJ1", "Gather", "came_BGJL", "last", axis=3)
    t("few_BGJ1", "Gather", "few_BGJL", "last", axis=3)
    t("stays_BGJ1", "Mul", "came_BGJ1", "few_BGJ1")
    t("taken_BGM1, at_BGM1", "TopK", "stays_BGJ1", t.ints(M), axis=2)
    picked = t("picked_BGMX", "GatherND", "row_sorted", "at_BGM1", batch_dims=2)
    t.slice("token_BGM1", picked, s.columns - 1, s.columns, 3)
    t("held", "Mul", _aged(t, s, J) if s.fade else picked, "token_BGM1")
    return t.lines


def around(s: Shape, steps: int) -> list[str]:
    """What every block reads: the logarithm of who of the last W is the step's own or before it."""
    t = Text("a")
    t.reshape("until_L1", t.ints(*range(s.window - steps, s.window)), steps, 1)
    t("comes_LW", "LessOrEqual", t.ints(*range(s.window)), "until_L1")
    t("counts_LW", "Cast", "comes_LW", to=1)
    t("own_LW", "Log", "counts_LW")
    return t.lines


def _raised(t: Text, s: Shape, steps: int) -> str:
    """`_gone`: what scores have lost when a token comes, and at the block's end those that last, as if they had."""
    t("comes_BG1J", "Mul", "token_BG1J", t.floats(*[0] * s.places, *[1] * steps))
    t("before_BG1J", "CumSum", "comes_BG1J", t.constant("value_int = 3"))
    t("last_candidate", "Add", "last", t.ints(s.places))
    t("all_BG11", "Gather", "before_BG1J", "last_candidate", axis=3)
    t("falls_BG1J", "Less", "score_BG1J", t.number(LASTING))
    t("lost_BG1J", "Where", "falls_BG1J", "before_BG1J", "all_BG11")
    t("gone_BG1J", "Mul", "lost_BG1J", t.number(1 / s.fade))
    return t("raised_BG1J", "Add", "score_BG1J", "gone_BG1J")


def _aged(t: Text, s: Shape, candidates: int) -> str:
    """The rows that stay, with what is left of their scores after the block."""
    t("gone_BG11", "Mul", "all_BG11", t.number(1 / s.fade))
    t("now_BG1J", "Sub", "score_sorted", "gone_BG11")
    t.reshape("now_BGJ1", "now_BG1J", 0, s.groups, candidates, 1)
    t("now_BGM1", "GatherND", "now_BGJ1", "at_BGM1", batch_dims=2)
    t.split(("key_picked", "was_BGM1", "value_picked"), "picked_BGMX", (s.key, 1, s.value + 1), 3)
    return t("aged_BGMX", "Concat", "key_picked", "now_BGM1", "value_picked", axis=3)
