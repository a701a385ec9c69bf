"""Attention with a cache as a function of the ONNX model: two products of standard operators.

Traced as torch code, sums of the lengths are symbols that torch's exporter reasons about for 2 seconds a layer; a
function has no declared shapes inside, and onnxruntime writes its body in place of every call. Measured in onnxruntime
1.32, one thread, one new step (microseconds at 64, 512, 2048 steps remembered): 4 heads of width 32, these products
24, 54, 497, the standard `Attention` (opset 23) 18, 53, 490; 8 heads of width 64 on 2 of keys 26, 73, 619 against 24,
106, 817, `GroupQueryAttention` 29, 127, 1066. Keys kept as (B, P, G, K) have to be transposed anew: 31, 115, 827.

B batch, T new steps, P steps that are remembered, S = P + T, H heads of queries, G heads of keys and values, K width of
queries and keys, C width of values
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thesean.deploy.lowering.lowered import add_function, require_exporting
from thesean.targets.shared.core import Core

DOMAIN, NAME = "thesean", "CachedAttention"
_KINDS = ("Grouped", "Capped", "Window", "Sink")


class CachedAttention(nn.Module):
    """Calls of the function. Half precision stays half: to cast the whole cache would cost more than the step."""

    def __init__(self, path: str, cap: float | None, window: int | None) -> None:
        super().__init__()
        self.path = path
        self.cap = cap
        self.window = window

    def forward(
        self,
        query_BHTK: torch.Tensor,
        key_BGTK: torch.Tensor,
        value_BGTC: torch.Tensor,
        bias_B1TS: torch.Tensor,
        past_BGPK: torch.Tensor,
        past_BGPC: torch.Tensor,
        *sink_H: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        require_exporting(self.path)
        heads, groups = query_BHTK.shape[1], key_BGTK.shape[1]
        attributes: dict[str, Any] = {}
        if heads != groups:
            # 0 stands for the size that is there, -1 for what is left
            attributes |= {"together": [0, groups, -1, query_BHTK.shape[3]], "by_group": [0, groups, -1, 0]}
            attributes |= {"by_head": [0, heads, -1, 0]}
        if self.cap is not None:
            attributes |= {"cap": float(self.cap)}
        length = past_BGPK.shape[2] + key_BGTK.shape[2]
        if self.window is not None:
            length = torch.sym_min(length, self.window - 1)
            attributes |= {"start": [-(self.window - 1) if self.window > 1 else 2**63 - 1]}
        there = (heads != groups, self.cap, self.window, sink_H)
        kinds = "".join(kind for kind, given in zip(_KINDS, there, strict=True) if given)
        made = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}{kinds}",
            (query_BHTK, key_BGTK, value_BGTC, bias_B1TS, past_BGPK, past_BGPC, *sink_H),
            attrs=attributes,
            dtypes=[query_BHTK.dtype] * 3,
            shapes=[
                [*query_BHTK.shape[:3], value_BGTC.shape[3]],
                [*key_BGTK.shape[:2], length, key_BGTK.shape[3]],
                [*value_BGTC.shape[:2], length, value_BGTC.shape[3]],
            ],
            version=1,
        )
        return tuple(made)


def lower(core: Core, path: str, opset: int) -> CachedAttention:
    return CachedAttention(path, core.settings.get("cap"), core.settings.get("window"))


def define(model: Any) -> None:
    """Add the functions that an onnx_ir model calls; others stay as they are."""
    called = {n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type.startswith(NAME)}
    for name in sorted(called):
        add_function(model, _function(name, model.opset_imports[""]))


def _function(name: str, opset: int) -> str:
    """`cached_attention`, line by line."""
    grouped, capped, window, sunk = (kind in name for kind in _KINDS)
    attributes = [
        *(["together", "by_group", "by_head"] if grouped else []),
        *(["cap"] if capped else []),
        *(["start"] if window else []),
    ]
    kept = ("longer_key", "longer_value") if window else ("next_key", "next_value")
    lines = [
        f"{kept[0]} = Concat <axis = 2> (past_key, key)",
        f"{kept[1]} = Concat <axis = 2> (past_value, value)",
        f"turned = Transpose <perm = [0, 1, 3, 2]> ({kept[0]})",
    ]
    if grouped:
        lines += ["t = Constant <value_ints: ints = @together> ()", "rows = Reshape (query, t)"]
        lines += ["h = Constant <value_ints: ints = @by_head> ()", "g = Constant <value_ints: ints = @by_group> ()"]
    lines += [f"product = MatMul ({'rows' if grouped else 'query'}, turned)"]
    scores = "product"
    if capped:
        lines += ["c = Constant <value_float: float = @cap> ()", "cap = CastLike (c, product)"]
        lines += ["within = Div (product, cap)", "bent = Tanh (within)", "capped = Mul (bent, cap)"]
        scores = "capped"
    if grouped:
        lines += [f"by_head = Reshape ({scores}, h)"]
        scores = "by_head"
    lines += [f"seen = Add ({scores}, bias)"]
    if sunk:
        # a column of zeros, of a row's first scores less themselves, makes the sinks as many as there are queries
        lines += ["at = Constant <value_ints = [0]> ()", "to = Constant <value_ints = [1]> ()"]
        lines += ["along = Constant <value_ints = [3]> ()", "less = Constant <value_ints = [-1]> ()"]
        lines += ["first = Slice (seen, at, to, along)", "nothing = Sub (first, first)"]
        lines += ["outer = Constant <value_ints = [1, 2]> ()", "by_query = Unsqueeze (sink, outer)"]
        lines += ["column = Add (nothing, by_query)", "all = Concat <axis = 3> (seen, column)"]
        lines += ["shares = Softmax <axis = -1> (all)", "weights = Slice (shares, at, less, along)"]
    else:
        lines += ["weights = Softmax <axis = -1> (seen)"]
    if grouped:
        lines += [
            "by_group = Reshape (weights, g)",
            f"mean = MatMul (by_group, {kept[1]})",
            "mixed = Reshape (mean, h)",
        ]
    else:
        lines += [f"mixed = MatMul (weights, {kept[1]})"]
    if window:
        lines += ["start = Constant <value_ints: ints = @start> ()"]
        lines += ["end = Constant <value_ints = [9223372036854775807]> ()", "axis = Constant <value_ints = [2]> ()"]
        lines += [f"next_{n} = Slice (longer_{n}, start, end, axis)" for n in ("key", "value")]
    declared = f" <{', '.join(attributes)}>" if attributes else ""
    body = "\n".join(f"    {line}" for line in lines)
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name}{declared} (query, key, value, bias, past_key, past_value{', sink' if sunk else ''}) => "
        "(mixed, next_key, next_value)\n"
        f"{{\n{body}\n}}"
    )
