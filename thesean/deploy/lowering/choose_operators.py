"""Which form linear attention takes in a file: onnxruntime's operator, or plain products where that is slow.

B batch, T time, H heads of queries, G heads of keys and values, F features, K width of a value
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from thesean.deploy.lowering.lean.edit import MICROSOFT
from thesean.deploy.lowering.linear_products import OPERATOR, decays_by_head, heads_of, linear_products
from thesean.deploy.timing.turns import measure
from thesean.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

Operators = Literal["auto", "fused", "products"]

_STEPS, _FEATURES, _COLUMNS = 512, 64, 32  # of what is timed
_FASTER = 0.8  # of the operator's time; a step is a little slower with products


def parse_operators(operators: Any) -> Operators:
    """Raises ExportError."""
    if operators not in get_args(Operators):
        raise ExportError(f"operators: expected one of {', '.join(get_args(Operators))}, found {operators!r}.")
    found: Operators = operators
    return found


def choose_operators(model: ir.Model, operators: Operators) -> tuple[str, str]:
    """Write products where they are wanted -> which form `model` has, "" where it has no linear attention, and a note
    where that is not the operator's.

    "auto" times both on this machine, once a process: the operator is fast where the processor has AVX-512.
    """
    if not decays_by_head(model):
        return "", ""
    if operators == "fused":
        return operators, ""
    told = "linear attention as products"
    if operators == "auto":
        fused_ms, products_ms = timed(*heads_of(model))
        logger.debug("linear attention, %d steps: %.3g ms, as products %.3g ms", _STEPS, fused_ms, products_ms)
        if products_ms > _FASTER * fused_ms:
            return "fused", ""
        told += (
            f": {products_ms:.2g} ms for {_STEPS} steps on this machine, {fused_ms:.2g} ms by onnxruntime's operator"
        )
    linear_products(model)
    return "products", told


@cache
def timed(heads: int, groups: int) -> tuple[float, float]:
    """Milliseconds of _STEPS steps on one thread: onnxruntime's operator, and products."""
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    sizes = {
        "query": (1, _STEPS, heads * _FEATURES),
        "key": (1, _STEPS, groups * _FEATURES),
        "value": (1, _STEPS, groups * _COLUMNS),
        "state": (1, groups, _FEATURES, _COLUMNS),
        "log_decay": (1, _STEPS, groups),
    }
    feeds = {name: rng.random(size, np.float32) for name, size in sizes.items()}
    feeds["log_decay"] = -feeds["log_decay"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    sessions = {}
    for name in ("fused", "products"):
        model = _alone(heads, groups)
        if name == "products":
            linear_products(model)
        sessions[name] = ort.InferenceSession(_bytes(model), options, providers=["CPUExecutionProvider"])
    calls = {name: lambda s=session: s.run(None, feeds) for name, session in sessions.items()}
    taken = measure(calls, repeats=7, seconds=0.5)
    return taken["fused"].median_ms, taken["products"].median_ms


def _alone(heads: int, groups: int) -> ir.Model:
    import onnx
    import onnx_ir as ir

    text: Any = f"""<ir_version: 10, opset_import: ["" : 20, "{MICROSOFT}" : 1]>
    alone (float[B, T, Q] query, float[B, T, P] key, float[B, T, V] value, float[B, G, F, K] state,
           float[B, T, {groups}] log_decay) => (float[B, T, O] out, float[B, G, F, K] after)
    {{
        out, after = {MICROSOFT}.{OPERATOR} <q_num_heads = {heads}, kv_num_heads = {groups}, scale = 1.0,
            update_rule = "gated"> (query, key, value, state, log_decay)
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def _bytes(model: ir.Model) -> bytes:
    import onnx_ir as ir

    found: bytes = ir.to_proto(model).SerializeToString()
    return found
