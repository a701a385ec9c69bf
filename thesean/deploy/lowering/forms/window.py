"""A window, its sinks and what is older as one function of the ONNX model, with a branch of its own for one step.

Written for any number of steps, a step costs a hundred small nodes a layer, and a node costs more than what it computes
(onnxruntime 1.32, one thread: .5 microseconds, an `If` 1.3). One step needs a third of them: nothing is in blocks or
transposed, sinks and window are one tensor and one softmax, and a row that holds no token gets log(0).

B batch, T time, S = W + T, W window, N sinks, M = N + W, H heads, G heads of keys and values, R = H / G, C width of
queries and keys, K width of values, k = K + 1, X = C + k, F = 2C features
"""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from thesean.deploy.lowering.forms import window_attention
from thesean.deploy.lowering.lowered import Lowered, add_function
from thesean.deploy.lowering.value_blocks import value_blocks
from thesean.targets.shared.signed_softmax import signed_map
from thesean.targets.shared.steps import Steps
from thesean.targets.shared.window import Window

DOMAIN = window_attention.DOMAIN
_NAME = re.compile(r"Window_H(\d+)_G(\d+)_C(\d+)_K(\d+)_W(\d+)_N(\d+)(_turned)?(_biased)?")


class Shape(NamedTuple):
    """What a function is written for; its name says all of it."""

    heads: int
    groups: int
    key: int
    value: int
    window: int
    sinks: int
    turned: bool
    biased: bool

    @property
    def name(self) -> str:
        sizes = "_".join(f"{letter}{size}" for letter, size in zip("HGCKWN", self[:6], strict=True))
        return f"Window_{sizes}" + ("_turned" if self.turned else "") + ("_biased" if self.biased else "")

    @classmethod
    def of(cls, name: str) -> Shape | None:
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        heads, groups, key, value, window, sinks = map(int, found.groups()[:6])
        return cls(heads, groups, key, value, window, sinks, bool(found.group(7)), bool(found.group(8)))


class LoweredWindow(nn.Module):
    """A call of the function; where steps may hold no token, the module as torch code, its cores lowered."""

    def __init__(self, window: Window, path: str, opset: int) -> None:
        super().__init__()
        from thesean.deploy.lowering.lower import lower_cells  # which finds this file by its name

        self.scale, self.size, self.places, self.ahead = window.scale, window.size, window.places, window.ahead
        self.turned, self.biased = window.rotate is not None, window.bias is not None
        self.gate_H = window.gate_H
        self.emitted = Lowered(path, self._emit)
        self.extra: list[str] = []
        with torch.no_grad():
            if window.rotate is not None:
                rotate = window.rotate
                cos_M1C, sin_M1C = rotate.tables(self.places + self.size, torch.zeros(()))
                self._keep("cos_MC", cos_M1C.squeeze(1))
                self._keep("sin_MC", sin_M1C.squeeze(1))
                for name in ("partner_C", "leading_C", "rest_C", "sign_C"):
                    self._keep(name, getattr(rotate, name).detach().clone())
            if window.bias is not None:
                bias_HM = window._bias(0, self.places + self.size).detach().float()
                self._keep("bias_HM", bias_HM.flip(1).contiguous())
                self._keep("bias_HW", bias_HM[:, : self.size].contiguous())
        inner = copy.copy(window)
        inner._modules = {
            n: None if m is None else lower_cells(m, opset=opset, path=path) for n, m in window._modules.items()
        }
        self.inner = inner

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor)
        self.extra.append(name)

    def forward(
        self,
        query_BTHC: torch.Tensor,
        new_BTGX: torch.Tensor,
        log_decay_BTG: torch.Tensor,
        maps: tuple[torch.Tensor, torch.Tensor],
        state: tuple[torch.Tensor, torch.Tensor],
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        if steps is not None or self.ahead:
            made: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = self.inner(
                query_BTHC, new_BTGX, log_decay_BTG, maps, state, steps
            )
            return made
        map_ICF = torch.cat([signed_map(m) for m in maps])
        given = (query_BTHC.flatten(2), new_BTGX.flatten(2), log_decay_BTG, *state, self.gate_H, map_ICF)
        mean_BTHK, linear, held = self.emitted(*given)
        return mean_BTHK, (linear.to(state[0].dtype), held.to(state[1].dtype))

    def _emit(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_BTE, new_BTX, log_decay_BTG, linear, held, gate_H, _ = tensors
        (batch, time, width), heads, groups = query_BTE.shape, len(gate_H), log_decay_BTG.shape[2]
        key = width // heads
        value = new_BTX.shape[2] // groups - key - 1
        shape = Shape(heads, groups, key, value, self.size, self.places, self.turned, self.biased)
        mean_BTE, linear, held = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{shape.name}",
            (*tensors, *(getattr(self, name) for name in self.extra)),  # in float32, whatever the network is in
            {"scale": self.scale},
            dtypes=[query_BTE.dtype] * 3,
            shapes=[[batch, time, heads * value], linear.shape, held.shape],
            version=1,
        )
        return mean_BTE.unflatten(-1, (heads, value)), linear, held


def lower(window: Window, path: str, opset: int) -> LoweredWindow:
    return LoweredWindow(window, path, opset)


def define(model: Any) -> None:
    """Add the functions that an onnx_ir model calls, and what they call; others stay as they are."""
    calls = [n for n in model.graph if n.domain == DOMAIN and Shape.of(n.op_type) is not None]
    shapes = [shape for name in sorted({n.op_type for n in calls}) if (shape := Shape.of(name)) is not None]
    _tell_steps(model, calls)
    for shape in shapes:
        add_function(model, _function(shape, model.opset_imports[""]))
    for biased in sorted({shape.biased for shape in shapes}):
        window_attention.add(model, window_attention.BIASED if biased else window_attention.NAME)


def _tell_steps(model: Any, calls: list[Any]) -> None:
    """Whether there is one step, found out once for all calls of a length: their last input."""
    import onnx_ir as ir

    known: dict[str, Any] = {}
    for call in calls:
        length = str(call.inputs[0].shape[1])
        if length not in known:
            one = ir.Value(name=f"one_step_{len(known)}", const_value=ir.tensor([1]))
            one.shape, one.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
            model.graph.register_initializer(one)
            time = ir.node("Shape", [call.inputs[0]], {"start": 1, "end": 2})
            found = ir.node("Equal", [time.outputs[0], one])
            time.outputs[0].name, found.outputs[0].name = f"steps_{len(known)}", f"is_step_{len(known)}"
            model.graph.insert_before(call, [time, found])
            known[length] = found.outputs[0]
        call.resize_inputs(len(call.inputs) + 1)
        call.replace_input_with(len(call.inputs) - 1, known[length])


def _function(shape: Shape, opset: int) -> str:
    inputs = ["query_BTE", "new_BTX", "log_decay_BTG", "linear", "held", "gate_H", "map_ICF"]
    inputs += ["cos_MC", "sin_MC", "partner_C", "leading_C", "rest_C", "sign_C"] if shape.turned else []
    inputs += ["bias_HM", "bias_HW"] if shape.biased else []
    inputs += ["is_step"]
    outputs = "float[B, T, E] mean_{0}, float[B, G, F, k] linear_{0}, float[B, G, M, X] held_{0}"
    step, chunk = (
        f"{name} () => ({outputs.format(name)})\n    {{\n" + "\n".join(f"        {x}" for x in lines) + "\n    }"
        for name, lines in (("step", _step(shape)), ("chunk", _chunk(shape)))
    )
    return f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}, "com.microsoft" : 1, "{DOMAIN}" : 1]>
{shape.name} <scale> ({", ".join(inputs)}) => (mean_BTE, next_linear, next_held)
{{
    mean_BTE, next_linear, next_held = If (is_step) <then_branch = {step}, else_branch = {chunk}>
}}
"""


class _Text:
    """Lines of a graph; constants are written where they are first used."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.lines = prefix, list[str]()
        self._known: dict[str, str] = {}

    def ints(self, *numbers: int) -> str:
        return self._constant(f"value_ints = [{', '.join(map(str, numbers))}]")

    def floats(self, *numbers: float) -> str:
        return self._constant(f"value_floats = [{', '.join(f'{float(n)!r}' for n in numbers)}]")

    def constant(self, text: str) -> str:
        return self._constant(text)

    def _constant(self, text: str) -> str:
        if text not in self._known:
            self._known[text] = f"{self.prefix}_c{len(self._known)}"
            self.lines.append(f"{self._known[text]} = Constant <{text}> ()")
        return self._known[text]

    def __call__(self, made: str, kind: str, *inputs: str, **attributes: Any) -> str:
        """`made` = kind <attributes> (inputs); the names that it makes."""
        told = ", ".join(
            f"{k} = {v}" if not isinstance(v, Reference) else f"{k}: float = {v}" for k, v in attributes.items()
        )
        self.lines.append(f"{made} = {kind} {f'<{told}> ' if told else ''}({', '.join(inputs)})")
        return made

    def reshape(self, made: str, x: str, *sizes: int) -> str:
        return self(made, "Reshape", x, self.ints(*sizes))

    def split(self, made: tuple[str, ...], x: str, sizes: tuple[int, ...], axis: int) -> tuple[str, ...]:
        """Parts of size 0 are left out."""
        kept = [(n, s) for n, s in zip(made, sizes, strict=True) if s]
        if len(kept) == 1:
            self(kept[0][0], "Identity", x)
        else:
            self(", ".join(n for n, _ in kept), "Split", x, self.ints(*(s for _, s in kept)), axis=axis)
        return made

    def slice(self, made: str, x: str, start: int, end: int, axis: int) -> str:
        return self(made, "Slice", x, self.ints(start), self.ints(end), self.ints(axis))


class Reference(str):
    """An attribute of the function, as one of a node."""


_END = 2**63 - 1


def _step(s: Shape) -> list[str]:
    """T = 1. Sinks and window in one: in distances, a sink stands right before the window as it does there."""
    t = _Text("s")
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
    key = "held_step"
    if s.turned:
        t.slice("key_BGMC", "held_step", 0, C, 3)
        key = _turn(t, "key", "key_BGMC", "cos_MC", "sin_MC")
        cos, sin = (t.slice(f"{name}_1C", f"{name}_MC", M - 1, M, 0) for name in ("cos", "sin"))
        own = _turn(t, "query", own, cos, sin)
    else:
        own = t("query_BGRX", "Pad", own, t.ints(0, 0, 0, 0, 0, 0, 0, k))
    scores = t("scores", "com.microsoft.FusedMatMul", own, key, transB=1, alpha=Reference("@scale"))
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


def _turn(t: _Text, name: str, x: str, cos: str, sin: str) -> str:
    t(f"{name}_cos", "Mul", x, cos)
    t(f"{name}_partner", "Gather", x, "partner_C", axis=-1)
    t(f"{name}_sin", "Mul", f"{name}_partner", sin)
    return t(f"{name}_turned", "Add", f"{name}_cos", f"{name}_sin")


def _chunk(s: Shape) -> list[str]:
    """Any T: `Window.forward` line by line, its two cores as they are written elsewhere."""
    t = _Text("c")
    H, G, C, K, W, N = s[:6]
    k = K + 1
    t("time", "Shape", "query_BTE", start=1, end=2)
    t.reshape("query_BTHC", "query_BTE", 0, 0, H, C)
    t.reshape("new_BTGX", "new_BTX", 0, 0, G, C + k)
    t.split(("map_query", "map_key"), "map_ICF", (H, G), 0)
    t("held_BMGX", "Transpose", "held", perm=[0, 2, 1, 3])
    t.split(("first_BNGX", "past_BWGX"), "held_BMGX", (N, W), 1)
    t("all_BSGX", "Concat", "past_BWGX", "new_BTGX", axis=1)
    t("left_BTGX", "Slice", "all_BSGX", t.ints(0), "time", t.ints(1))
    t.slice("kept_BWGX", "all_BSGX", -W, _END, 1)
    t.split(("key_BSGC", "value_BSGk"), "all_BSGX", (C, k), 3)
    t.split(("left_key", "left_value"), "left_BTGX", (C, k), 3)
    value, kept = ("rest", "kept_BMGX") if N else ("left_value", "kept_BWGX")
    if N:
        _take(t, s)
        t("kept_BMGX", "Concat", "firsts_BNGX", "kept_BWGX", axis=1)
    t("held_chunk", "Transpose", kept, perm=[0, 2, 1, 3])
    for name, x, heads in (("query", "query_BTHC", H), ("key", "left_key", G)):
        t(f"{name}_by_head", "Transpose", x, perm=[0, 2, 1, 3])
        t(f"{name}_mapped", "MatMul", f"{name}_by_head", f"map_{name}")
        t(f"{name}_phi", "Softmax", f"{name}_mapped", axis=-1)
        t(f"{name}_by_step", "Transpose", f"{name}_phi", perm=[0, 2, 1, 3])
        if -2 * C % 16:
            t(f"{name}_wide", "Pad", f"{name}_by_step", t.ints(0, 0, 0, 0, 0, 0, 0, -2 * C % 16))
        t.reshape(
            f"{name}_BTx", f"{name}_wide" if -2 * C % 16 else f"{name}_by_step", 0, 0, heads * (2 * C + -2 * C % 16)
        )
    _linear(t, s, value)
    t("scale", "Constant", value_float=Reference("@scale"))
    t("scaled_BTHC", "Mul", "query_BTHC", "scale")
    older, gate = _sinks(t, s) if N else ("older_BTHk", "gate_H")
    query, key = "scaled_BTHC", "key_BSGC"
    if s.turned:
        query, key = _turned(t, W)
    bias = ["bias_HW"] if s.biased else []
    name = window_attention.BIASED if s.biased else window_attention.NAME
    t("mean_BTHK", f"{DOMAIN}.{name}", query, key, "value_BSGk", older, gate, *bias)
    t.reshape("mean_chunk", "mean_BTHK", 0, 0, H * K)
    return t.lines


def _take(t: _Text, s: Shape) -> None:
    """`Sinks.take`, its counts in floats."""
    G, N, X = s.groups, s.sinks, s.key + s.value + 1
    ends = t.ints(0, X - 1), t.ints(1, X), t.ints(2, 3)
    for name in ("left_BTGX", "first_BNGX"):
        t(f"{name}_token", "Slice", name, *ends)
        t(f"{name}_flag", "Squeeze", f"{name}_token", t.ints(3))
    t("before_B11", "ReduceSum", "first_BNGX_flag", t.ints(1), keepdims=1)
    t("came_BT1", "CumSum", "left_BTGX_flag", t.constant("value_int = 1"))
    t("count_BT1", "Add", "before_B11", "came_BT1")
    t("own_BT1", "Mul", "count_BT1", "left_BTGX_flag")
    places = t.floats(*range(1, N + 1))
    t("at_BTN", "Equal", "own_BT1", places)
    t("taken_BTN", "Cast", "at_BTN", to=1)
    t("taken_BNT", "Transpose", "taken_BTN", perm=[0, 2, 1])
    t.reshape("left_BTx", "left_BTGX", 0, 0, G * X)
    t("taken_BNx", "MatMul", "taken_BNT", "left_BTx")
    t.reshape("taken_BNGX", "taken_BNx", 0, N, G, X)
    t("firsts_BNGX", "Add", "first_BNGX", "taken_BNGX")
    t("past_BT1", "Greater", "count_BT1", t.floats(N))
    t("full_BT1", "Cast", "past_BT1", to=1)
    t("full_BT11", "Unsqueeze", "full_BT1", t.ints(3))
    t("rest", "Mul", "left_value", "full_BT11")


def _linear(t: _Text, s: Shape, value: str) -> None:
    """`linear_attention_operator`: older_BTHk and the state after it."""
    H, G, C, K = s[:4]
    missing, blocks = -2 * C % 16, value_blocks(K + 1)
    widths = tuple(width for width, _ in blocks)
    names = [f"b{i}" for i in range(len(blocks))]
    t.split(tuple(f"value_{n}" for n in names), value, widths, 3)
    t.split(tuple(f"linear_{n}" for n in names), "linear", widths, 3)
    for n, (width, padded) in zip(names, blocks, strict=True):
        given, state, more = f"value_{n}", f"linear_{n}", padded - width
        if more or missing:
            given = t(f"value_{n}_wide", "Pad", given, t.ints(0, 0, 0, 0, 0, 0, 0, more))
            state = t(f"linear_{n}_wide", "Pad", state, t.ints(0, 0, 0, 0, 0, 0, missing, more))
        t.reshape(f"value_{n}_x", given, 0, 0, G * padded)
        t(f"out_{n}_x, state_{n}", "com.microsoft.LinearAttention", "query_BTx", "key_BTx", f"value_{n}_x", state,
          "log_decay_BTG", q_num_heads=H, kv_num_heads=G, scale=1.0, update_rule='"gated"')  # fmt: skip
        t.reshape(f"out_{n}", f"out_{n}_x", 0, 0, H, padded)
        if more or missing:
            t.slice(f"out_{n}_narrow", f"out_{n}", 0, width, 3)
            t(f"state_{n}_narrow", "Slice", f"state_{n}", t.ints(0, 0), t.ints(2 * C, width), t.ints(2, 3))
    parts = [(f"out_{n}", f"state_{n}") for n in names]
    parts = [
        (f"{o}_narrow", f"{z}_narrow") if padded > width or missing else (o, z)
        for (o, z), (width, padded) in zip(parts, blocks, strict=True)
    ]
    many = {"axis": 3} if len(parts) > 1 else {}
    t("older_BTHk", "Concat" if many else "Identity", *(o for o, _ in parts), **many)
    t("linear_chunk", "Concat" if many else "Identity", *(z for _, z in parts), **many)


def _sinks(t: _Text, s: Shape) -> tuple[str, str]:
    """`Sinks.scores` and `add_sinks`: (sums of older tokens and sinks, their scale)."""
    C, K, W, N = s[2:6]
    query = "scaled_BTHC"
    t.split(("first_key", "first_value"), "firsts_BNGX", (C, K + 1), 3)
    key = "first_key"
    if s.turned:
        cos, sin = (t.slice(f"{n}_last", f"{n}_MC", N + W - 1, N + W, 0) for n in ("cos", "sin"))
        query = _turn(t, "asked", query, cos, sin)
        tables = [t.slice(f"{n}_NC", f"{n}_MC", 0, N, 0) for n in ("cos", "sin")]
        cos, sin = (
            t(f"{n}_N1C", "Unsqueeze", table, t.ints(1)) for n, table in zip(("cos", "sin"), tables, strict=True)
        )
        key = _turn(t, "first", key, cos, sin)
    t("key_BGCN", "Transpose", key, perm=[0, 2, 3, 1])
    t("value_BGNk", "Transpose", "first_value", perm=[0, 2, 1, 3])
    t("product_BGxN", "MatMul", _by_group(t, "asked_by_group", query, s, C), "key_BGCN")
    scores = _by_step(t, "sink_scores", "product_BGxN", s, N)
    if s.biased:
        scores = t("sink_biased", "Add", scores, t.slice("bias_HN", "bias_HM", 0, N, 1))
    t("empty_BTN", "Less", "count_BT1", t.floats(*range(1, N + 1)))
    t("empty_BT1N", "Unsqueeze", "empty_BTN", t.ints(2))
    t("seen_BTHN", "Where", "empty_BT1N", t.constant("value = float {-inf}"), scores)
    t("peak_BTH", "ReduceMax", "seen_BTHN", t.ints(-1), keepdims=0)
    t("top_BTH", "Max", "peak_BTH", "gate_H")
    t("top_BTH1", "Unsqueeze", "top_BTH", t.ints(3))
    t("below_BTHN", "Sub", "seen_BTHN", "top_BTH1")
    t("weights_BTHN", "Exp", "below_BTHN")
    t("sums_BGxk", "MatMul", _by_group(t, "weights_by_group", "weights_BTHN", s, N), "value_BGNk")
    sums = _by_step(t, "sink_sums", "sums_BGxk", s, K + 1)
    t("gate_below", "Sub", "gate_H", "top_BTH")
    t("gate_weight", "Exp", "gate_below")
    t("gate_BTH1", "Unsqueeze", "gate_weight", t.ints(3))
    t("older_share", "Mul", "older_BTHk", "gate_BTH1")
    return t("older_with_sinks", "Add", sums, "older_share"), "top_BTH"


def _by_group(t: _Text, name: str, x: str, s: Shape, width: int) -> str:
    """(B, T, H, width) -> (B, G, T R, width)."""
    if s.heads == s.groups:
        return t(name, "Transpose", x, perm=[0, 2, 1, 3])
    t.reshape(f"{name}_apart", x, 0, 0, s.groups, -1, width)
    t(f"{name}_turned", "Transpose", f"{name}_apart", perm=[0, 2, 1, 3, 4])
    return t.reshape(name, f"{name}_turned", 0, s.groups, -1, width)


def _by_step(t: _Text, name: str, x: str, s: Shape, width: int) -> str:
    """The inverse."""
    if s.heads == s.groups:
        return t(name, "Transpose", x, perm=[0, 2, 1, 3])
    t.reshape(f"{name}_apart", x, 0, s.groups, -1, s.heads // s.groups, width)
    t(f"{name}_turned", "Transpose", f"{name}_apart", perm=[0, 2, 1, 3, 4])
    return t.reshape(name, f"{name}_turned", 0, 0, s.heads, width)


def _turned(t: _Text, window: int) -> tuple[str, str]:
    """Queries and keys of the window, as `Rotate` turns them: counted from its first row."""
    t("spans", "Shape", "all_BSGX", start=1, end=2)
    t("S", "Squeeze", "spans")
    t("row_S", "Range", t.constant("value_int = 0"), "S", t.constant("value_int = 1"))
    t("step_S", "Cast", "row_S", to=1)
    t("step_S1", "Unsqueeze", "step_S", t.ints(1))
    t("turns_SC", "Mul", "step_S1", "leading_C")
    t("whole_SC", "Floor", "turns_SC")
    t("part_SC", "Sub", "turns_SC", "whole_SC")
    t("more_SC", "Mul", "step_S1", "rest_C")
    t("turn_SC", "Add", "part_SC", "more_SC")
    t("angle_SC", "Mul", "turn_SC", t.constant("value_float = 6.28318531"))
    t("cos_SC", "Cos", "angle_SC")
    t("sine_SC", "Sin", "angle_SC")
    t("sin_SC", "Mul", "sine_SC", "sign_C")
    for name in ("cos", "sin"):
        t(f"{name}_S1C", "Unsqueeze", f"{name}_SC", t.ints(1))
        t.slice(f"{name}_T1C", f"{name}_S1C", window, _END, 0)
    query = _turn(t, "windowed", "scaled_BTHC", "cos_T1C", "sin_T1C")
    return query, _turn(t, "keys", "key_BSGC", "cos_S1C", "sin_S1C")
