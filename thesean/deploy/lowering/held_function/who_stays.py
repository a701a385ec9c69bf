"""Who stays at one step, for all layers at once: it hangs on what was held before, not on the step itself.

The least of those that were kept and of the token that leaves the window goes, and the step's own takes its place. In
each layer by itself that would be some thirty nodes a layer, and at one token nodes are what costs. All places of a
head lie along the last axis: where that is 1 wide, onnxruntime goes through an Add to a scalar number by number.

B batch, L layers, G heads of keys and values, Z = L G, W window, M places before it, N = M + W
"""

from __future__ import annotations

from thesean.deploy.lowering.held_function.block import FAR
from thesean.deploy.lowering.held_function.shape import CHOSEN, Shape
from thesean.deploy.lowering.text import Text, branches
from thesean.kernels.kept_attention import LASTING

_KINDS = {
    "slot": "int64[B, G, three]",
    "seen": "float[B, G, one, N]",
    "marks": "float[B, G, two, N]",
    "own": "bool[B, G, two, N]",
}


def who_stays(s: Shape, layers: int) -> str:
    """The function, but for its opsets. Of several steps it tells nothing: what it puts out there is read by none."""
    given = [f"before_{i}" for i in range(layers)]
    made = [f"{_KINDS[name]} {name}_{i}" for name in CHOSEN for i in range(layers)]
    return branches(s.who_stays(layers), given, made, (_step(s, layers), _chunk(layers)))


def _step(s: Shape, layers: int) -> list[str]:
    """Of equals any goes, which makes no difference: the others count for nothing then. Where places are free, one of
    these is taken.
    """
    t = Text("s")
    G, N = s.groups, s.all_places
    before = [f"before_{i}" for i in range(layers)]
    every = t("every_BZ2N", "Concat", *before, axis=1) if layers > 1 else before[0]
    t.split(("time_BZ1N", "came_BZ1N"), every, (1, 1), 2)
    t("token_BZ1N", "Clip", "time_BZ1N", t.number(0.0), t.number(1.0))
    t("gone_BZ1N", "Sub", "time_BZ1N", t.number(1.0))
    t("now_BZ1N", "Max", "gone_BZ1N", "token_BZ1N")  # what was kept stays at 1, and what is none at 0
    score = "came_BZ1N"
    if s.fade:  # those that were kept score less by 1 / fade; what a free place scores is read by none
        t("by_BZ1N", "HardSigmoid", "gone_BZ1N", alpha=-1 / s.fade, beta=1 / s.fade)  # 0 in the window
        t("falls_BZ1N", "HardSigmoid", "came_BZ1N", alpha=-1.0, beta=LASTING)  # 1 below LASTING, 0 from there on
        t("less_BZ1N", "Mul", "falls_BZ1N", "by_BZ1N")
        score = t("score_BZ1N", "Sub", "came_BZ1N", "less_BZ1N")
    # far below what is kept where a place is free, and far above in the window
    t("class_BZ1N", "Sub", "now_BZ1N", t.number(1.0))
    t("apart_BZ1N", "Mul", "class_BZ1N", t.number(FAR))
    t("rank_BZ1N", "Add", "apart_BZ1N", score)
    t("two_BZ12, at_BZ12", "TopK", "rank_BZ1N", t.ints(2), axis=3, largest=0)
    t.slice("least_BZ11", "at_BZ12", 0, 1, 3)
    # where more than one place is free, all that hold a token count whole
    t.slice("second_BZ11", "two_BZ12", 1, 2, 3)
    t("above_BZ1N", "Sub", "rank_BZ1N", "second_BZ11")
    t("faded_BZ1N", "Clip", "above_BZ1N", t.number(0.0), t.number(1.0))
    t("own_BZ1N", "Equal", t.ints(*range(N)), "least_BZ11")
    t("counts_BZ1N", "Where", "own_BZ1N", t.number(1.0), "faded_BZ1N")
    t("seen_BZ1N", "Log", "counts_BZ1N")
    t("after_BZ1N", "Where", "own_BZ1N", t.number(s.window + 1), "now_BZ1N")
    t("marks_BZ2N", "Concat", "after_BZ1N", score, axis=2)
    own = ", ".join(map(str, (*[-1] * N, *range(N))))
    t("own_BZ2N", "Equal", t.constant(f"value = int64[2, {N}] {{{own}}}"), "least_BZ11")
    _slots(t, G, layers)
    for name, every in zip(CHOSEN, ("slot_BZ3", "seen_BZ1N", "marks_BZ2N", "own_BZ2N"), strict=True):
        t.split(tuple(f"{name}_{i}_step" for i in range(layers)), every, (G,) * layers, 1)
    return t.lines


def _slots(t: Text, groups: int, layers: int) -> None:
    """slot_BZ3: row of the batch, head, and the place there."""
    t("batch", "Shape", "before_0", start=0, end=1)
    t("rows", "Squeeze", "batch")
    t("row_B", "Range", t.constant("value_int = 0"), "rows", t.constant("value_int = 1"))
    t.reshape("row_B11", "row_B", -1, 1, 1)
    t("row_B13", "Mul", "row_B11", t.ints(1, 0, 0))
    heads = ", ".join(f"0, {head}, 0" for _ in range(layers) for head in range(groups))
    t("head_BZ3", "Add", "row_B13", t.constant(f"value = int64[{layers * groups}, 3] {{{heads}}}"))
    t.reshape("least_BZ1", "least_BZ11", 0, layers * groups, 1)
    t("place_BZ3", "Mul", "least_BZ1", t.ints(0, 0, 1))
    t("slot_BZ3", "Add", "head_BZ3", "place_BZ3")


def _chunk(layers: int) -> list[str]:
    """Nothing, of the right types."""
    t = Text("c")
    for name in CHOSEN:
        kind = _KINDS[name].split("[")[0]
        sizes = t.ints(*[0] * (3 if name == "slot" else 4))
        for i in range(layers):
            t(f"{name}_{i}_chunk", "ConstantOfShape", sizes, value=f"{kind}[1] {{0}}")
    return t.lines
