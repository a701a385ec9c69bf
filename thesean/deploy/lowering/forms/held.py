"""The last tokens and those that were kept as one function of the ONNX model, with a branch of its own for one step.

A step drops the least of what was kept and of what leaves the window, adds its own row at the end, and attends over
what is left: one softmax, nothing sorted, no older state. See forms/window.py for why a step is not written as a chunk.

B batch, T time, W window, M kept, N = M + W, H heads, G heads of keys and values, R = H / G, C width of queries and
keys, K width of values, k = K + 1, X = C + 1 + k
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from thesean.deploy.lowering.forms import kept_attention, window_attention
from thesean.deploy.lowering.lowered import Lowered, add_function
from thesean.deploy.lowering.text import END, Reference, Text, branches, tell_steps
from thesean.kernels.kept_attention import LASTING
from thesean.targets.shared.held import Held
from thesean.targets.shared.steps import Steps

DOMAIN = window_attention.DOMAIN

# what no score comes near to
_FAR = 1e30


class Shape(NamedTuple):
    """What a function is written for; its name says all of it."""

    heads: int
    groups: int
    key: int
    value: int
    window: int
    places: int
    fade: int

    @property
    def name(self) -> str:
        return "Held_" + "_".join(f"{letter}{size}" for letter, size in zip("HGCKWMF", self, strict=True))

    @classmethod
    def of(cls, name: str) -> Shape | None:
        found = re.fullmatch("Held_" + "_".join(rf"{letter}(\d+)" for letter in "HGCKWMF"), name)
        return None if found is None else cls(*map(int, found.groups()))


class LoweredHeld(nn.Module):
    """A call of the function; where steps may hold no token, the module as torch code, its cores lowered."""

    def __init__(self, held: Held, path: str, opset: int) -> None:
        super().__init__()
        from thesean.deploy.lowering.lower import lower_inside  # which finds this file by its name

        self.scale = held.scale
        self.sizes = held.window, held.places, held.fade
        self.window, self.places = held.window, held.places  # the module around it reads them
        self.emitted = Lowered(path, self._emit)
        self.inner = lower_inside(held, opset=opset, path=path)

    def forward(
        self,
        query_BTHC: torch.Tensor,
        row_BTGX: torch.Tensor,
        held_BGNX: torch.Tensor,
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if steps is not None:
            mean_BTHK, held_BGNX = self.inner(query_BTHC, row_BTGX, held_BGNX, steps)
            return mean_BTHK, held_BGNX
        mean_BTE, held = self.emitted(query_BTHC, row_BTGX, held_BGNX)
        return mean_BTE.unflatten(-1, (query_BTHC.shape[2], -1)), held.to(held_BGNX.dtype)

    def _emit(
        self, query_BTHC: torch.Tensor, row_BTGX: torch.Tensor, held_BGNX: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch, time, heads, key = query_BTHC.shape
        value = held_BGNX.shape[3] - key - 2
        mean_BTE, held = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{Shape(heads, held_BGNX.shape[1], key, value, *self.sizes).name}",
            (query_BTHC, row_BTGX, held_BGNX),
            {"scale": self.scale},
            dtypes=[query_BTHC.dtype] * 2,
            shapes=[[batch, time, heads * value], held_BGNX.shape],
            version=1,
        )
        return mean_BTE, held


def lower(held: Held, path: str, opset: int) -> LoweredHeld:
    return LoweredHeld(held, path, opset)


def portable(held: Held, path: str, opset: int) -> None:
    """Torch code: its step reads an operator of onnxruntime's own, its cores do not."""


def define(model: Any) -> None:
    """Add the functions that an onnx_ir model calls, and what they call; others stay as they are."""
    calls = [n for n in model.graph if n.domain == DOMAIN and Shape.of(n.op_type) is not None]
    shapes = [shape for name in sorted({n.op_type for n in calls}) if (shape := Shape.of(name)) is not None]
    tell_steps(model, calls)
    opsets = f'"" : {model.opset_imports[""]}, "com.microsoft" : 1, "{DOMAIN}" : 1'
    for shape in shapes:
        given, outputs = ["query_BTHC", "row_BTGX", "before"], ["float[B, T, E] mean", "float[B, G, N, X] held"]
        text = branches(shape.name, given, outputs, (one_step(shape), any_steps(shape)), "<scale> ")
        add_function(model, f'<domain: "{DOMAIN}", opset_import: [{opsets}]>\n{text}')
    for fade in sorted({shape.fade for shape in shapes}):
        kept_attention.add(model, fade)
    if shapes:
        window_attention.add(model, window_attention.NAME)


def one_step(s: Shape) -> list[str]:
    """T = 1. Of equals the last is dropped, and where no token is before all that are.

    The state is copied twice, where the new row is added and where one is dropped; scores fall in place, and the one
    that is dropped is attended to with weight 0.
    """
    t = Text("s")
    H, G, C, K, W, M, F = s
    X, N, J = C + K + 2, W + M, M + 1
    t.reshape("row_BG1X", "row_BTGX", 0, G, 1, X)
    t("came_BGSX", "Concat", "before", "row_BG1X", axis=2)
    t.cut("came_BGJ1", "came_BGSX", (0, J, 2), (C, C + 1, 3))
    t.cut("token_BGJ1", "came_BGSX", (0, J, 2), (X - 1, X, 3))
    all_rows, score = "came_BGSX", "came_BGJ1"
    if F:  # those that were kept score less by 1 / F: of all their columns that one
        t("falls_BGJ1", "HardSigmoid", "came_BGJ1", alpha=-1.0, beta=LASTING)  # 1 below LASTING, 0 from there on
        t("fall_BGJ1", "Mul", "falls_BGJ1", "token_BGJ1")
        t.reshape("by_J1", t.floats(*[1 / F] * M, 0.0), J, 1)
        t("less_BGJ1", "Mul", "fall_BGJ1", "by_J1")
        score = t("score_BGJ1", "Sub", "came_BGJ1", "less_BGJ1")
        t("sizes", "Shape", score)
        t("at_BGJ1", "ConstantOfShape", "sizes", value=f"int64[1] {{{C}}}")
        all_rows = t("all_BGSX", "ScatterElements", "came_BGSX", "at_BGJ1", score, axis=3)
    t("none_BGJ1", "Log", "token_BGJ1")
    t("rank_BGJ1", "Add", score, "none_BGJ1")
    t("least_BG11", "ArgMin", "rank_BGJ1", axis=2, keepdims=1, select_last_index=1)
    # where a row holds no token the least is far below all that do, and these count whole
    t("two_BG21, _", "TopK", "rank_BGJ1", t.ints(2), axis=2, largest=0)
    t.slice("second_BG11", "two_BG21", 1, 2, 2)
    t("limit_BG11", "Max", "second_BG11", t.number(-_FAR))
    t("above_BGJ1", "Sub", "rank_BGJ1", "limit_BG11")
    t("faded_BGJ1", "Clip", "above_BGJ1", t.number(0.0), t.number(1.0))
    t.reshape("query_BGRC", "query_BTHC", 0, G, H // G, C)
    t("query_BGRX", "Pad", "query_BGRC", t.ints(0, 0, 0, 0, 0, 0, 0, X - C))
    t("scores", "com.microsoft.FusedMatMul", "query_BGRX", all_rows, transB=1, alpha=Reference("@scale"))
    t.cut("window_BGW1", all_rows, (J, END, 2), (X - 1, X, 3))
    t("counts_BGS1", "Concat", "faded_BGJ1", "window_BGW1", axis=2)
    t.reshape("counts_BG1S", "counts_BGS1", 0, G, 1, N + 1)
    t("seen_BG1S", "Log", "counts_BG1S")
    t("logits", "Add", "scores", "seen_BG1S")
    t("weights", "Softmax", "logits", axis=-1)
    t("mean_BGRX", "MatMul", "weights", all_rows)
    t.slice("mean_BGRK", "mean_BGRX", C + 1, C + 1 + K, 3)
    t.reshape("mean_step", "mean_BGRK", 0, 1, H * K)
    t.reshape("row_N1", t.ints(*range(N)), N, 1)
    t("after_BGN1", "Sub", "row_N1", "least_BG11")
    t("moved_BGN1", "Add", "after_BGN1", t.ints(1))
    t("by_BGN1", "Clip", "moved_BGN1", t.constant("value_int = 0"), t.constant("value_int = 1"))
    t("from_BGN1", "Add", "row_N1", "by_BGN1")
    t("held_step", "GatherND", all_rows, "from_BGN1", batch_dims=2)
    return t.lines


def any_steps(s: Shape) -> list[str]:
    """Any T: `Held.forward` line by line, its two cores as they are written elsewhere."""
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
        f"{DOMAIN}.{kept_attention.name_of(F)}",
        "scaled_BTHC",
        "left_BTGX",
        "kept_BMGX",
    )
    t.split(("key_BSGC", "score_BSG1", "value_BSGk"), "all_BSGX", (C, 1, K + 1), 3)
    t("mean_BTHK", f"{DOMAIN}.{window_attention.NAME}", "scaled_BTHC", "key_BSGC", "value_BSGk", "sums_BTHk", "top_BTH")
    t.reshape("mean_chunk", "mean_BTHK", 0, 0, H * K)
    t.slice("last_BWGX", "all_BSGX", -W, END, 1)
    t("held_BNGX", "Concat", "stay_BMGX", "last_BWGX", axis=1)
    t("held_chunk", "Transpose", "held_BNGX", perm=[0, 2, 1, 3])
    return t.lines
