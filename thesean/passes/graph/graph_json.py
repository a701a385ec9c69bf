"""A graph as JSON and back: readable, and safe to load from strangers.

Nothing in the file is executed or imported. Operators are looked up by name in torch.ops.aten and must be functional
(no mutation, no file names), or be one of a few Python operators on sizes; anything else is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from thesean.errors import ArtifactError

_PYTHON: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv,
        operator.mod, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    )
} | {
    f"torch.{f.__name__}": f
    for f in (torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float)
}  # fmt: skip

# the only text that an operator may take: modes, never names of files or devices
_TEXT_ARGUMENTS = {
    "approximate", "mode", "rounding_mode", "equation", "indexing", "reduction", "side", "padding_mode", "padding",
    "reduce", "norm", "ord", "interpolation", "padding_side", "pad_mode",
}  # fmt: skip

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool)
}  # fmt: skip
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    str(f).removeprefix("torch."): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}


def target_name(target: Any) -> str:
    """`aten.addmm.default`, `operator.getitem`. Raises ArtifactError for what could not be loaded again."""
    for name, function in _PYTHON.items():
        if function is target:
            return name
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._opname}.{target._overloadname}"
        if _find(name) is not None:
            return name
    raise ArtifactError(f"operator {target} can't be saved: expected one of aten's without side effects.")


def resolve_target(name: str) -> Callable[..., Any]:
    """The operator of that name. Raises ArtifactError when it is outside of the allow-list."""
    if not isinstance(name, str):
        raise ArtifactError(f"graph.json: {name!r:.80} is not an operator's name.")
    found = _PYTHON.get(name) or _find(name)
    if found is None:
        raise ArtifactError(f"graph.json: operator {name!r} is outside of the allow-list; the file was altered.")
    return found


def _find(name: str) -> torch._ops.OpOverload | None:
    """The harmless aten operator of that name."""
    pieces = name.split(".")
    if len(pieces) != 3 or pieces[0] != "aten" or not all(p.isidentifier() for p in pieces):
        return None
    overload = getattr(getattr(torch.ops.aten, pieces[1], None), pieces[2], None)
    return overload if isinstance(overload, torch._ops.OpOverload) and _is_harmless(overload) else None


def _is_harmless(overload: torch._ops.OpOverload) -> bool:
    schema = overload._schema
    text = {a.name for a in schema.arguments if "str" in str(a.type)}
    return not schema.is_mutable and text <= _TEXT_ARGUMENTS


def dump(graph: fx.Graph) -> list[dict[str, Any]]:
    """Nodes in order, JSON values only."""
    rows = []
    for node in graph.nodes:
        row: dict[str, Any] = {"name": node.name, "op": node.op}
        row["target"] = target_name(node.target) if node.op == "call_function" else str(node.target)
        if node.op == "output":
            row["value"] = _encode(node.args[0])
        elif node.op != "placeholder":
            row["args"] = [_encode(a) for a in node.args]
            if node.kwargs:
                row["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
        rows.append(row)
    return rows


def load(rows: Any) -> fx.Graph:
    """The inverse of `dump`. Raises ArtifactError for anything that `dump` would not have written."""
    if not isinstance(rows, list) or not rows:
        raise ArtifactError("graph.json: expected a list of nodes.")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in rows:
        try:
            node = _load_node(graph, row, nodes)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ArtifactError(f"graph.json: node {row!r:.80} is malformed ({error}).") from error
        if node is not None:
            nodes[row["name"]] = node
    if [i for i, row in enumerate(rows) if row["op"] == "output"] != [len(rows) - 1]:
        raise ArtifactError("graph.json: the last node alone should be the output; the file is truncated or altered.")
    graph.lint()
    return graph


def _load_node(graph: fx.Graph, row: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node | None:
    op, name, target = row["op"], row["name"], row["target"]
    if not (isinstance(name, str) and name.isidentifier()):
        raise ArtifactError(f"graph.json: {name!r} is not a node's name.")
    if name in nodes:
        raise ArtifactError(f"graph.json: node {name!r} is there twice.")
    if op == "output":
        graph.output(_decode(row["value"], nodes))
        return None
    if op in ("get_attr", "call_module", "placeholder"):
        if not is_attribute_path(target) or (op == "placeholder" and not target.isidentifier()):
            raise ArtifactError(f"graph.json: {target!r} is not an attribute's path.")
        args = tuple(_decode(a, nodes) for a in row.get("args", []))
        return graph.create_node(op, target, args, _load_keywords(row, nodes), name=name)
    if op == "call_function":
        args = tuple(_decode(a, nodes) for a in row["args"])
        return graph.create_node(op, resolve_target(target), args, _load_keywords(row, nodes), name=name)
    raise ArtifactError(f"graph.json: unknown kind of node {op!r}.")


def _load_keywords(row: dict[str, Any], nodes: dict[str, fx.Node]) -> dict[str, Any]:
    kwargs = {k: _decode(v, nodes) for k, v in row.get("kwargs", {}).items()}
    if not all(k.isidentifier() for k in kwargs):
        raise ArtifactError("graph.json: a keyword is not a name.")
    return kwargs


def is_attribute_path(target: Any) -> bool:
    """Whether FX writes this path of a module into its generated source as the name that it is, and as nothing else.

    What is no identifier ("[cls]", "user id") stands there between quotes.
    """
    if not isinstance(target, str):
        return False
    names = target.split(".")
    return all(n.isprintable() and n and not n.startswith("__") and not {'"', "\\"} & set(n) for n in names)


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"format": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {str(k): _encode(v) for k, v in value.items()}}
    raise ArtifactError(f"an argument of type {type(value).__name__} can't be saved.")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ArtifactError(f"graph.json: malformed value {value!r:.80}.")
    kind, inner = next(iter(value.items()))
    match kind:
        case "node":
            return nodes[inner]
        case "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
        case "dtype":
            return _DTYPES[inner]
        case "device":
            return torch.device({"cpu": "cpu", "cuda": "cuda", "xpu": "xpu", "mps": "mps"}[inner])
        case "layout":
            return _LAYOUTS[inner]
        case "format":
            return _FORMATS[inner]
        case "slice":
            start, stop, step = (_decode(v, nodes) for v in inner)
            return slice(start, stop, step)
        case "tuple":
            return tuple(_decode(v, nodes) for v in inner)
        case "dict":
            return {k: _decode(v, nodes) for k, v in inner.items()}
    raise ArtifactError(f"graph.json: unknown value {kind!r}.")
