"""Softmax attention over the tokens with the highest scores as a function of the ONNX model: standard operators.

A function has no declared shapes inside, so that any length goes. Who stays is found by comparing all pairs of a
block's tokens and the kept ones, as the kernel does it; a `Scan` goes from block to block. Comparing all pairs of the
whole text, 2,048 tokens took the demo's converted network 3.1 s; so they take .12 (onnxruntime 1.32, one thread).

B batch, T time, N blocks of L tokens, H heads, G heads of keys and values, R = H / G, C width of queries and keys,
X = C + 1 + k columns of a token, M tokens that are kept, J = M + L
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch

from thesean.deploy.lowering.in_torch import AtOnce
from thesean.deploy.lowering.lowered import Lowered, add_function
from thesean.kernels.kept_attention import BLOCK, LASTING
from thesean.targets.shared.core import Core

DOMAIN, NAME, _BLOCK_NAME = "thesean", "KeptAttention", "KeptBlock"

# rows that fill the last block up hold no token
_BODY = f"""
<domain: "{DOMAIN}", opset_import: ["" : OPSET, "{DOMAIN}" : 1]>
NAME (query_BTHC, new_BTGX, kept_BMGX) => (sums_BTHk, top_BTH, held_BMGX)
{{
    zero = Constant <value = float {{0.0}}> ()
    v0 = Constant <value_ints = [0]> ()
    v1 = Constant <value_ints = [1]> ()
    L = Constant <value_ints = [{BLOCK}]> ()
    same = Constant <value_ints = [0]> ()
    blocks = Constant <value_ints = [-1]> ()
    times = Shape <start = 1, end = 2> (query_BTHC)
    heads = Shape <start = 2, end = 4> (query_BTHC)
    groups = Shape <start = 2, end = 4> (new_BTGX)
    short = Neg (times)
    missing = Mod (short, L)
    pads = Concat <axis = 0> (v0, missing)
    query_whole = Pad (query_BTHC, pads, zero, v1)
    new_whole = Pad (new_BTGX, pads, zero, v1)
    split_query = Concat <axis = 0> (same, blocks, L, heads)
    split_new = Concat <axis = 0> (same, blocks, L, groups)
    query_BNLHC = Reshape (query_whole, split_query)
    new_BNLGX = Reshape (new_whole, split_new)
    held_BMGX, sums_BNLHk, top_BNLH = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1, 1],
        body = block (float[B, M, G, X] kept, float[B, L, H, C] query, float[B, L, G, X] new)
            => (float[B, M, G, X] held, float[B, L, H, k] sums, float[B, L, H] top)
        {{
            sums, top, held = {DOMAIN}.BLOCK (query, new, kept)
        }}> (kept_BMGX, query_BNLHC, new_BNLGX)
    sums_shape = Shape <start = 3> (sums_BNLHk)
    top_shape = Shape <start = 3> (top_BNLH)
    sums_joined = Concat <axis = 0> (same, blocks, sums_shape)
    top_joined = Concat <axis = 0> (same, blocks, top_shape)
    sums_whole = Reshape (sums_BNLHk, sums_joined)
    top_whole = Reshape (top_BNLH, top_joined)
    sums_BTHk = Slice (sums_whole, v0, times, v1)
    top_BTH = Slice (top_whole, v0, times, v1)
}}
"""

# `_block` of the kernel, line by line.
_BLOCK = f"""
<domain: "{DOMAIN}", opset_import: ["" : OPSET]>
BLOCK (query_BTHC, new_BTGX, kept_BMGX) => (sums_BTHk, top_BTH, held_BMGX)
{{
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    half = Constant <value = float {{0.5}}> ()
    ever = Constant <value = float {{inf}}> ()
    whole = Constant <value = float {{1.0}}> ()
    nothing = Constant <value = float {{0.0}}> ()
    least = Constant <value = float {{-3.4028234663852886e38}}> ()
    v0 = Constant <value_ints = [0]> ()
    v1 = Constant <value_ints = [1]> ()
    v2 = Constant <value_ints = [2]> ()
    v3 = Constant <value_ints = [3]> ()
    rest = Constant <value_ints = [-1]> ()
    same = Constant <value_ints = [0, 0]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    start = Constant <value_ints = [-9223372036854775807]> ()

    times = Shape <start = 1, end = 2> (query_BTHC)
    heads = Shape <start = 2, end = 3> (query_BTHC)
    width = Shape <start = 3, end = 4> (query_BTHC)
    places = Shape <start = 1, end = 2> (kept_BMGX)
    groups = Shape <start = 2, end = 3> (kept_BMGX)
    score_at = Add (width, v1)
    all_BJGX = Concat <axis = 1> (kept_BMGX, new_BTGX)
    all_BGJX = Transpose <perm = [0, 2, 1, 3]> (all_BJGX)
    key_BGJC = Slice (all_BGJX, v0, width, v3)
    score_BGJ1 = Slice (all_BGJX, width, score_at, v3)
    value_BGJk = Slice (all_BGJX, score_at, end, v3)
    token_BGJ1 = Slice (all_BGJX, rest, end, v3)
    score_BG1J = Transpose <perm = [0, 1, 3, 2]> (score_BGJ1)
    token_BG1J = Transpose <perm = [0, 1, 3, 2]> (token_BGJ1)

    T = Squeeze (times)
    M = Squeeze (places)
    J = Add (T, M)
    row_J = Range (zero, J, one)
    row_J1 = Unsqueeze (row_J, v1)
    row_T = Range (M, J, one)
    row_T1 = Unsqueeze (row_T, v1)
    held_BG1J = Greater (token_BG1J, half)
    GONE
    higher_BGJJ = Greater (raised_BGJ1, raised_BG1J)
    equal_BGJJ = Equal (raised_BGJ1, raised_BG1J)
    earlier_JJ = Less (row_J1, row_J)
    before_BGJJ = And (equal_BGJJ, earlier_JJ)
    beats_BGJJ = Or (higher_BGJJ, before_BGJJ)
    came_TJ = LessOrEqual (row_J, row_T1)
    here_BGTJ = And (held_BG1J, came_TJ)
    here = Cast <to = 1> (here_BGTJ)
    beats = Cast <to = 1> (beats_BGJJ)
    better_BGTJ = MatMul (here, beats)
    most = Cast <to = 1> (M)
    few_BGTJ = Less (better_BGTJ, most)
    stays_BGTJ = And (here_BGTJ, few_BGTJ)

    split = Concat <axis = 0> (same, groups, rest, width)
    query_BTGRC = Reshape (query_BTHC, split)
    query_BGRTC = Transpose <perm = [0, 2, 3, 1, 4]> (query_BTGRC)
    key_BGCJ = Transpose <perm = [0, 1, 3, 2]> (key_BGJC)
    key_BG1CJ = Unsqueeze (key_BGCJ, v2)
    product_BGRTJ = MatMul (query_BGRTC, key_BG1CJ)
    stays = Cast <to = 1> (stays_BGTJ)
    count_BGT1 = ReduceSum <keepdims = 1> (stays, rest)
    short_BGT1 = Less (count_BGT1, most)
    others_BGTJ = Where (stays_BGTJ, raised_BG1J, ever)
    least_BGT1 = ReduceMin <keepdims = 1> (others_BGTJ, rest)
    above_BGTJ = Sub (raised_BG1J, least_BGT1)
    counts_BGTJ = Where (short_BGT1, ever, above_BGTJ)
    part_BGTJ = Clip (counts_BGTJ, nothing, whole)
    faded_BGTJ = Mul (part_BGTJ, stays)
    log_BGTJ = Log (faded_BGTJ)
    log_BG1TJ = Unsqueeze (log_BGTJ, v2)
    scores_BGRTJ = Add (product_BGRTJ, log_BG1TJ)
    peak_BGRT1 = ReduceMax <keepdims = 1> (scores_BGRTJ, rest)
    top_BGRT1 = Max (peak_BGRT1, least)
    below_BGRTJ = Sub (scores_BGRTJ, top_BGRT1)
    weights_BGRTJ = Exp (below_BGRTJ)
    value_BG1Jk = Unsqueeze (value_BGJk, v2)
    sums_BGRTk = MatMul (weights_BGRTJ, value_BG1Jk)
    sums_BTGRk = Transpose <perm = [0, 3, 1, 2, 4]> (sums_BGRTk)
    top_BTGR1 = Transpose <perm = [0, 3, 1, 2, 4]> (top_BGRT1)
    sums_shape = Concat <axis = 0> (same, heads, rest)
    top_shape = Concat <axis = 0> (same, heads)
    sums_BTHk = Reshape (sums_BTGRk, sums_shape)
    top_BTH = Reshape (top_BTGR1, top_shape)

    last_BG1J = Slice (stays_BGTJ, rest, end, v2)
    last_BGJ = Squeeze (last_BG1J, v2)
    stay_BGJ = Cast <to = 1> (last_BGJ)
    after_J = Add (row_J, one)
    order_J = Cast <to = 1> (after_J)
    placed_BGJ = Mul (stay_BGJ, order_J)
    last_BGM, from_BGM = TopK <axis = -1> (placed_BGJ, places)
    place_BGM = Slice (last_BGM, rest, start, v2, rest)
    index_BGM = Slice (from_BGM, rest, start, v2, rest)
    index_BGM1 = Unsqueeze (index_BGM, v3)
    LEFT
    picked_BGMX = GatherND <batch_dims = 2> (left_BGJX, index_BGM1)
    taken_BGM = Greater (place_BGM, half)
    taken = Cast <to = 1> (taken_BGM)
    taken_BGM1 = Unsqueeze (taken, v3)
    kept_BGMX = Mul (picked_BGMX, taken_BGM1)
    held_BMGX = Transpose <perm = [0, 2, 1, 3]> (kept_BGMX)
}}
"""


# where scores never change
_STILL = {
    "GONE": """raised_BGJ1 = Identity (score_BGJ1)
    raised_BG1J = Identity (score_BG1J)""",
    "LEFT": "left_BGJX = Identity (all_BGJX)",
}
# where they fall with time: `_gone`, and what is left of them
_FALLING = {
    "GONE": f"""fade = Constant <value = float {{FADE.0}}> ()
    lasting = Constant <value = float {{{LASTING}}}> ()
    last_axis = Constant <value = int64 {{-1}}> ()
    is_new_J = GreaterOrEqual (row_J, M)
    comes_BG1J = And (held_BG1J, is_new_J)
    comes = Cast <to = 1> (comes_BG1J)
    came_BG1J = CumSum (comes, last_axis)
    all_BG11 = Slice (came_BG1J, rest, end, v3)
    falls_BG1J = Less (score_BG1J, lasting)
    lost_BG1J = Where (falls_BG1J, came_BG1J, all_BG11)
    gone_BG1J = Div (lost_BG1J, fade)
    raised_BG1J = Add (score_BG1J, gone_BG1J)
    raised_BGJ1 = Transpose <perm = [0, 1, 3, 2]> (raised_BG1J)""",
    "LEFT": """all_gone_BG11 = Slice (gone_BG1J, rest, end, v3)
    to_come_BG1J = Sub (gone_BG1J, all_gone_BG11)
    now_BG1J = Add (score_BG1J, to_come_BG1J)
    now_BGJ1 = Transpose <perm = [0, 1, 3, 2]> (now_BG1J)
    left_BGJX = Concat <axis = 3> (key_BGJC, now_BGJ1, value_BGJk)""",
}


def name_of(fade: int, of: str = NAME) -> str:
    """Of the function in which scores fall by 1 / fade with each token, or of its block."""
    return f"{of}_F{fade}" if fade else of


def kept_attention(
    query_BTHC: torch.Tensor, new_BTGX: torch.Tensor, kept_BMGX: torch.Tensor, *, fade: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A call of the function."""
    columns = new_BTGX.shape[3] - query_BTHC.shape[3] - 1
    sums_BTHk, top_BTH, held_BMGX = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name_of(fade)}",
        (query_BTHC, new_BTGX, kept_BMGX),
        dtypes=[query_BTHC.dtype, query_BTHC.dtype, kept_BMGX.dtype],
        shapes=[[*query_BTHC.shape[:3], columns], query_BTHC.shape[:3], kept_BMGX.shape],
        version=1,
    )
    return sums_BTHk, top_BTH, held_BMGX


def lower(core: Core, path: str, opset: int) -> Lowered:
    return Lowered(path, partial(kept_attention, **core.settings))


def in_torch(core: Core, path: str) -> AtOnce:
    return AtOnce(core, "block")


def define(model: Any) -> None:
    """Add the functions that an onnx_ir model calls; others stay as they are."""
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(called):
        if found := re.fullmatch(rf"{NAME}(?:_F(\d+))?", name):
            add(model, int(found[1] or 0))


def add(model: Any, fade: int) -> None:
    words = {"OPSET": str(model.opset_imports[""]), "NAME": name_of(fade), "BLOCK": name_of(fade, _BLOCK_NAME)}
    parts = {word: text.replace("FADE", str(fade)) for word, text in (_FALLING if fade else _STILL).items()}
    for text in (_BODY, _BLOCK):
        add_function(model, re.sub(r"\b[A-Z]{4,}\b", lambda word: {**words, **parts}.get(word[0], word[0]), text))
