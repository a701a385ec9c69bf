"""A graph as JSON and back: readable, and safe to load from strangers.

Nothing in the file is executed or imported. Operators are those of `operators.py`, with the values that it admits;
names are those that generated code can hold. Shapes and dtypes are for `fitting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from thesean.errors import ArtifactError
from thesean.passes.graph.operators import check_values, names, operators
from thesean.passes.graph.spelled import is_spelled, read_as_written

# Nodes whose target is the path of what the network holds
_HELD = ("get_attr", "call_module")

# What the generated code calls by name, and what it calls itself: no input may stand in its place.
_TAKEN = {
    "self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice", "float", "Ellipsis",
}  # fmt: skip
_LONGEST = 2000  # a name, or a path of names
_DEEPEST = 16  # outputs within outputs are 3 or 4

DTYPES = {
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
    found = names().get(target)
    if found is None:
        called = getattr(target, "__name__", target) if not isinstance(target, torch._ops.OpOverload) else target
        raise ArtifactError(
            f"operator {called} can't be saved: expected one of passes/graph/operators.py. Write it by others in "
            "the guide's forward, or convert a submodule without it."
        )
    return found


def resolve_target(name: str) -> Callable[..., Any]:
    """The operator of that name. Raises ArtifactError when it is outside of the allow-list."""
    found = operators().get(name) if isinstance(name, str) else None
    if found is None:
        raise ArtifactError(f"graph.json: operator {name!r:.80} is outside of the allow-list; the file was altered.")
    return found


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
    graph_nodes = list(graph.nodes)
    inputs = [n for n in graph_nodes if n.op == "placeholder"]
    if graph_nodes[: len(inputs)] != inputs or len({n.target for n in inputs}) != len(inputs):
        raise ArtifactError("graph.json: expected the inputs first, each of them once.")
    if [i for i, row in enumerate(rows) if row["op"] == "output"] != [len(rows) - 1]:
        raise ArtifactError("graph.json: the last node alone should be the output; the file is truncated or altered.")
    odd = [n.target for n in graph_nodes if n.op in _HELD and not all(map(str.isidentifier, n.target.split(".")))]
    if odd and not is_spelled():
        raise ArtifactError(f"graph.json: {odd[0]!r:.80} is no name that this version of torch can write.")
    try:
        graph.lint()
    except RuntimeError as error:
        raise ArtifactError(f"graph.json: the nodes are no graph ({error}).") from error
    return graph


def _load_node(graph: fx.Graph, row: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node | None:
    op, name, target = row["op"], row["name"], row["target"]
    if not _is_name(name):
        raise ArtifactError(f"graph.json: {name!r:.80} is not a node's name.")
    if name in nodes:
        raise ArtifactError(f"graph.json: node {name!r:.80} is there twice.")
    if op == "output":
        graph.output(_decode(row["value"], nodes))
        return None
    if op == "placeholder":
        if not _is_name(target) or target in _TAKEN or row.get("args") or row.get("kwargs"):
            raise ArtifactError(f"graph.json: {target!r:.80} is not an input's name.")
        return graph.create_node(op, target, name=name)
    if op not in (*_HELD, "call_function"):
        raise ArtifactError(f"graph.json: unknown kind of node {op!r:.80}.")
    args = tuple(_decode(a, nodes) for a in (row["args"] if op == "call_function" else row.get("args", [])))
    kwargs = {k: _decode(v, nodes) for k, v in row.get("kwargs", {}).items()}
    if not all(map(_is_name, kwargs)):
        raise ArtifactError("graph.json: a keyword is not a name.")
    if op == "call_function":
        function = resolve_target(target)
        check_values(target, args, kwargs)
        return graph.create_node(op, function, args, kwargs, name=name)
    if not is_attribute_path(target) or (op == "get_attr" and (args or kwargs)):
        raise ArtifactError(f"graph.json: {target!r:.80} is not an attribute's path.")
    return graph.create_node(op, target, args, kwargs, name=name)


def _is_name(value: Any) -> bool:
    """Whether generated code may write it as the name that it is."""
    return isinstance(value, str) and len(value) <= _LONGEST and value.isidentifier() and read_as_written(value)


def is_attribute_path(target: Any) -> bool:
    """Whether it names a module's own attribute, whatever that is called; not what Python has in every object."""
    if not isinstance(target, str) or len(target) > _LONGEST:
        return False
    return all(n and not (n.startswith("__") and n.endswith("__")) for n in target.split("."))


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
        return {"device": "cpu"}  # where a loaded network stands, wherever this one was made
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


def _decode(value: Any, nodes: dict[str, fx.Node], depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ArtifactError(f"graph.json: a value is nested more than {_DEEPEST} levels deep.")
    depth += 1
    if isinstance(value, list):
        return [_decode(v, nodes, depth) for v in value]
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
            return DTYPES[inner]
        case "device":
            if inner != "cpu":
                raise ArtifactError(
                    f"graph.json: a constant is on {inner!r:.20}; expected the CPU, where a loaded network stands. "
                    "Save the conversion again with this version, or move it to the CPU before."
                )
            return torch.device("cpu")
        case "layout":
            return _LAYOUTS[inner]
        case "format":
            return _FORMATS[inner]
        case "slice":
            start, stop, step = (_decode(v, nodes, depth) for v in inner)
            return slice(start, stop, step)
        case "tuple":
            return tuple(_decode(v, nodes, depth) for v in inner)
        case "dict":
            return {k: _decode(v, nodes, depth) for k, v in inner.items()}
    raise ArtifactError(f"graph.json: unknown value {kind!r}.")
