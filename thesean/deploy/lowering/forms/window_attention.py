"""Softmax attention over a window as a function of the ONNX model: standard operators, any length, O(T W).

A function has no declared shapes inside. Traced as torch code, the sizes of its blocks, min(T, max(W, 32)), are symbols
that torch's exporter reasons about for 10 seconds a part. onnxruntime writes the body in place of every call.

B batch, T time, S = W + T for a window of W tokens, H heads, G heads of keys and values, R = H / G, C width of queries
and keys, k = K + 1 columns of the values, N blocks of L queries, J = L + W keys that a block sees
"""

from __future__ import annotations

from typing import Any

import torch

from thesean.deploy.lowering.in_torch import AtOnce
from thesean.deploy.lowering.lowered import Lowered, add_function
from thesean.kernels.window_attention import LARGEST_EXPONENT, LEAST_BLOCK
from thesean.targets.shared.core import Core

DOMAIN, NAME, BIASED = "thesean", "WindowAttention", "BiasedWindowAttention"

# `window_attention`, line by line. `Range` ends a last block past T: its rows are repeated, and cut off again.
_BODY = f"""
<domain: "{DOMAIN}", opset_import: ["" : OPSET]>
CALL => (mean_BTHK)
{{
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    least = Constant <value = int64 {{{LEAST_BLOCK}}}> ()
    largest = Constant <value = float {{{LARGEST_EXPONENT}}}> ()
    half = Constant <value = float {{0.5}}> ()
    v0 = Constant <value_ints = [0]> ()
    v1 = Constant <value_ints = [1]> ()
    v2 = Constant <value_ints = [2]> ()
    v3 = Constant <value_ints = [3]> ()
    v5 = Constant <value_ints = [5]> ()
    rest = Constant <value_ints = [-1]> ()
    same = Constant <value_ints = [0, 0, 0]> ()
    end = Constant <value_ints = [9223372036854775807]> ()

    batch = Shape <start = 0, end = 1> (query_BTHC)
    times = Shape <start = 1, end = 2> (query_BTHC)
    heads = Shape <start = 2, end = 3> (query_BTHC)
    width = Shape <start = 3, end = 4> (query_BTHC)
    spans = Shape <start = 1, end = 2> (key_BSGC)
    groups = Shape <start = 2, end = 3> (key_BSGC)
    columns = Shape <start = 3, end = 4> (value_BSGk)
    T = Squeeze (times)
    S = Squeeze (spans)
    W = Sub (S, T)
    wide = Max (W, least)
    L = Min (T, wide)
    J = Add (L, W)
    end_query = Sub (T, one)
    end_key = Sub (S, one)

    start_N = Range (zero, T, L)
    start_N1 = Unsqueeze (start_N, v1)
    row_L = Range (zero, L, one)
    row_J = Range (zero, J, one)
    past_NL = Add (start_N1, row_L)
    past_NJ = Add (start_N1, row_J)
    at_NL = Min (past_NL, end_query)
    at_NJ = Min (past_NJ, end_key)

    query_BNLHC = Gather <axis = 1> (query_BTHC, at_NL)
    split = Concat <axis = 0> (same, groups, rest, width)
    query_BNLGRC = Reshape (query_BNLHC, split)
    query_BNGRLC = Transpose <perm = [0, 1, 3, 4, 2, 5]> (query_BNLGRC)
    key_BNJGC = Gather <axis = 1> (key_BSGC, at_NJ)
    key_BNGCJ = Transpose <perm = [0, 1, 3, 4, 2]> (key_BNJGC)
    key_BNG1CJ = Unsqueeze (key_BNGCJ, v3)
    value_BNJGk = Gather <axis = 1> (value_BSGk, at_NJ)
    value_BNGJk = Transpose <perm = [0, 1, 3, 2, 4]> (value_BNJGk)
    value_BNG1Jk = Unsqueeze (value_BNGJk, v3)

    row_L1 = Unsqueeze (row_L, v1)
    ahead_LJ = Sub (row_J, row_L1)
    after_LJ = Greater (ahead_LJ, zero)
    within_LJ = LessOrEqual (ahead_LJ, W)
    seen_LJ = And (after_LJ, within_LJ)
    one_group = Slice (value_BNG1Jk, v0, v1, v2)
    token_BN11J1 = Slice (one_group, rest, end, v5)
    token_BN111J = Transpose <perm = [0, 1, 2, 3, 5, 4]> (token_BN11J1)
    held_BN111J = Greater (token_BN111J, half)
    seen_BN11LJ = And (held_BN111J, seen_LJ)

    SCORES
    counts_BN11LJ = Cast <to = 1> (seen_BN11LJ)
    log_BN11LJ = Log (counts_BN11LJ)
    scores_BNGRLJ = Add (all_BNGRLJ, log_BN11LJ)
    peak_BNGRL1 = ReduceMax <keepdims = 1> (scores_BNGRLJ, rest)
    below_BNGRLJ = Sub (scores_BNGRLJ, peak_BNGRL1)
    weights_BNGRLJ = Exp (below_BNGRLJ)
    sums_BNGRLk = MatMul (weights_BNGRLJ, value_BNG1Jk)

    sums_BNLGRk = Transpose <perm = [0, 1, 4, 2, 3, 5]> (sums_BNGRLk)
    peak_BNLGR1 = Transpose <perm = [0, 1, 4, 2, 3, 5]> (peak_BNGRL1)
    sums_shape = Concat <axis = 0> (batch, rest, heads, columns)
    peak_shape = Concat <axis = 0> (batch, rest, heads, v1)
    sums_BXHk = Reshape (sums_BNLGRk, sums_shape)
    peak_BXH1 = Reshape (peak_BNLGR1, peak_shape)
    sums_BTHk = Slice (sums_BXHk, v0, times, v1)
    peak_BTH1 = Slice (peak_BXH1, v0, times, v1)

    gates = Unsqueeze (gate, rest)
    weight_BTH1 = Slice (older_BTHk, rest, end, v3)
    logarithm_BTH1 = Log (weight_BTH1)
    older_BTH1 = Add (logarithm_BTH1, gates)
    top_BTH1 = Max (peak_BTH1, older_BTH1)
    window_BTH1 = Sub (peak_BTH1, top_BTH1)
    window_factor = Exp (window_BTH1)
    gate_BTH1 = Sub (gates, top_BTH1)
    bounded_BTH1 = Min (gate_BTH1, largest)
    older_factor = Exp (bounded_BTH1)
    window_BTHk = Mul (sums_BTHk, window_factor)
    old_BTHk = Mul (older_BTHk, older_factor)
    all_BTHk = Add (window_BTHk, old_BTHk)
    sum_BTHK = Slice (all_BTHk, v0, rest, v3)
    sum_BTH1 = Slice (all_BTHk, rest, end, v3)
    mean_BTHK = Div (sum_BTHK, sum_BTH1)
}}
"""

_PRODUCT = "MatMul (query_BNGRLC, key_BNG1CJ)"
# name -> (arguments, what makes the scores of all keys)
_FUNCTIONS = {
    NAME: ("query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate", f"all_BNGRLJ = {_PRODUCT}"),
    BIASED: (
        "query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate, bias_HW",
        f"""product_BNGRLJ = {_PRODUCT}
    far_LJ = Sub (W, ahead_LJ)
    above_LJ = Max (far_LJ, zero)
    farthest = Sub (W, one)
    distance_LJ = Min (above_LJ, farthest)
    bias_HLJ = Gather <axis = 1> (bias_HW, distance_LJ)
    sizes_LJ = Shape <start = 1, end = 3> (bias_HLJ)
    grouped = Concat <axis = 0> (groups, rest, sizes_LJ)
    bias_GRLJ = Reshape (bias_HLJ, grouped)
    all_BNGRLJ = Add (product_BNGRLJ, bias_GRLJ)""",
    ),
}


def window_attention(
    query_BTHC: torch.Tensor,
    key_BSGC: torch.Tensor,
    value_BSGk: torch.Tensor,
    older_BTHk: torch.Tensor,
    gate: torch.Tensor,
    bias_HW: torch.Tensor | None = None,
) -> torch.Tensor:
    """A call of the function: query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate (H) or (B, T, H) and, where there is
    one, bias_HW -> mean_BTHK.
    """
    given = (query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate)
    mean_BTHK: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME if bias_HW is None else BIASED}",
        given if bias_HW is None else (*given, bias_HW),
        dtype=query_BTHC.dtype,
        shape=[*query_BTHC.shape[:3], value_BSGk.shape[-1] - 1],
        version=1,
    )
    return mean_BTHK


def lower(core: Core, path: str, opset: int) -> Lowered:
    return Lowered(path, window_attention)


def in_torch(core: Core, path: str) -> AtOnce:
    return AtOnce(core, "block")


def define(model: Any) -> None:
    """Add the functions to an onnx_ir model that calls them; others stay as they are."""
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in _FUNCTIONS:
        if name in called:
            add(model, name)


def add(model: Any, name: str) -> None:
    arguments, scores = _FUNCTIONS[name]
    text = _BODY.replace("CALL", f"{name} ({arguments})").replace("SCORES", scores)
    add_function(model, text.replace("OPSET", str(model.opset_imports[""])))
