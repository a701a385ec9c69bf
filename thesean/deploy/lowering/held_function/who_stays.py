"""Who stays at one step, for all layers at once: of what was held before, so that nothing of the step itself is read.

The least of those that were kept and of the token that leaves the window goes. In each layer by itself that would be
some thirty nodes a layer, and at one token nodes are what costs. All rows of a head lie along the last axis: where that
is 1 wide, onnxruntime goes through an Add to a scalar, or a GatherElements, number by number, at 10 to 20 times the
time.

B batch, L layers, G heads of keys and values, Z = L G, C width of keys, W window, M places before it, N = M + W rows
that are held, J = M + 1 of which one goes, S = N - 1 that go on
"""

from __future__ import annotations

from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import END, Text, branches
from thesean.kernels.kept_attention import LASTING

# what no score comes near to
_FAR = 1e30


def who_stays(s: Shape, layers: int) -> str:
    """The function, but for its opsets. Of a chunk it tells nothing: what it puts out there is read by none."""
    given = [f"before_{i}" for i in range(layers)]
    kinds = {"from": "int64[B, G, S, one]", "seen": "float[B, G, one, N]", "score": "float[B, G, M, one]"}
    made = [f"{kind} {name}_{i}" for name, kind in kinds.items() if name in s.choosing for i in range(layers)]
    if s.fade:
        made.append("int64[B, G, M, one] at")
    return branches(s.who_stays(layers), given, made, (_step(s, layers), _chunk(s, layers)))


def told(s: Shape, layers: int, layer: int) -> list[int]:
    """Which of the function's outputs are those of a layer, in the order of `choosing`."""
    return [i * layers + layer if name != "at" else i * layers for i, name in enumerate(s.choosing)]


def _step(s: Shape, layers: int) -> list[str]:
    """Of equals the last is dropped, and where no token is before all that are."""
    t = Text("s")
    W, M = s.window, s.places
    N, J, Z = W + M, M + 1, layers * s.groups
    each = (s.groups,) * layers
    both = [  # a row's score, and the 1 that says that it holds a token
        t(f"both_{i}", "Slice", f"before_{i}", t.ints(s.key), t.ints(END), t.ints(3), t.ints(s.value + 1))
        for i in range(layers)
    ]
    every = t("both_BZN2", "Concat", *both, axis=1) if layers > 1 else both[0]
    t("both_BZ2N", "Transpose", every, perm=[0, 1, 3, 2])
    t.split(("score_BZ1N", "token_BZ1N"), "both_BZ2N", (1, 1), 2)
    t.slice("token_BZ1J", "token_BZ1N", 0, J, 3)
    score = t.slice("came_BZ1J", "score_BZ1N", 0, J, 3)
    if s.fade:  # those that were kept score less by 1 / fade
        t("falls_BZ1J", "HardSigmoid", "came_BZ1J", alpha=-1.0, beta=LASTING)  # 1 below LASTING, 0 from there on
        t("fall_BZ1J", "Mul", "falls_BZ1J", "token_BZ1J")
        t("less_BZ1J", "Mul", "fall_BZ1J", t.floats(*[1 / s.fade] * M, 0.0))
        score = t("now_BZ1J", "Sub", "came_BZ1J", "less_BZ1J")
    t("none_BZ1J", "Log", "token_BZ1J")
    t("rank_BZ1J", "Add", score, "none_BZ1J")
    t("least_BZ11", "ArgMin", "rank_BZ1J", axis=3, keepdims=1, select_last_index=1)
    # where a row holds no token the least is far below all that do, and these count whole
    t("two_BZ12, _", "TopK", "rank_BZ1J", t.ints(2), axis=3, largest=0)
    t.slice("second_BZ11", "two_BZ12", 1, 2, 3)
    t("limit_BZ11", "Max", "second_BZ11", t.number(-_FAR))
    t("above_BZ1J", "Sub", "rank_BZ1J", "limit_BZ11")
    t("faded_BZ1J", "Clip", "above_BZ1J", t.number(0.0), t.number(1.0))
    count = "faded_BZ1J"
    if W > 1:
        t.slice("window_BZ1w", "token_BZ1N", J, END, 3)
        count = t("count_BZ1N", "Concat", "faded_BZ1J", "window_BZ1w", axis=3)
    # rows from the least on come from one further
    t("same_BZ1S", "Less", t.ints(*range(N - 1)), "least_BZ11")
    t("same", "Cast", "same_BZ1S", to=7)
    t("from_BZ1S", "Sub", t.ints(*range(1, N)), "same")
    t.reshape("from_BZS1", "from_BZ1S", 0, Z, N - 1, 1)
    t.split(tuple(f"from_{i}_step" for i in range(layers)), "from_BZS1", each, 1)
    t("seen_BZ1S", "Log", _without_the_least(t, "counts", count, N - 1, "same_BZ1S"))
    t("seen_BZ1N", "Pad", "seen_BZ1S", t.ints(0, 0, 0, 0, 0, 0, 0, 1))  # the step's own counts whole
    t.split(tuple(f"seen_{i}_step" for i in range(layers)), "seen_BZ1N", each, 1)
    if s.fade:
        same = "same_BZ1S" if W == 1 else t.slice("same_BZ1M", "same_BZ1S", 0, M, 3)
        t.reshape("kept_BZM1", _without_the_least(t, "kept", score, M, same), 0, Z, M, 1)
        t.split(tuple(f"score_{i}_step" for i in range(layers)), "kept_BZM1", each, 1)
        t("sizes", "Shape", "score_0_step")
        t("at_step", "ConstantOfShape", "sizes", value=f"int64[1] {{{s.key}}}")
    return t.lines


def _without_the_least(t: Text, made: str, x: str, left: int, same: str) -> str:
    """Those of the last axis that are left, where `same` says whether one stands before the least."""
    t.slice(f"{made}_at", x, 0, left, 3)
    t.slice(f"{made}_after", x, 1, left + 1, 3)
    return t(f"{made}_left", "Where", same, f"{made}_at", f"{made}_after")


def _chunk(s: Shape, layers: int) -> list[str]:
    """Nothing, of the right types."""
    t = Text("c")
    for name in s.choosing:
        kind = "int64" if name in ("from", "at") else "float"
        for made in ("at",) if name == "at" else (f"{name}_{i}" for i in range(layers)):
            t(f"{made}_chunk", "ConstantOfShape", t.ints(0, 0, 0, 0), value=f"{kind}[1] {{0}}")
    return t.lines
