"""The same network in another precision: what a file is written in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from thesean.kernels.shared.precision import HALF
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import attribute, is_complex
from thesean.passes.graph.signature import Signature

aten = torch.ops.aten

Dtypes = Mapping[torch.dtype, torch.dtype]  # what becomes what


@dataclass(frozen=True)
class CastFloats(Pass):
    """weights and casts of one precision  =>  of another, by `dtypes`; inputs and outputs follow.

    What is in none of these precisions stays: a norm that is computed in float32 beside half-precision weights is
    still so in another half precision. Numbers past the range of the new one become its largest. What is computed from
    sizes alone, such as a table of angles, is computed as it was and cast where it meets anything else. Complex numbers
    are of float32 where real ones are of half precision: few operators, and no file, know any of halves.
    """

    in_place = True

    dtypes: Dtypes

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not self._applies(graph_module):
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes)) or "another precision"
            return PassResult.unchanged(graph_module, f"nothing in it is {names}")
        least = min(torch.finfo(d).max for d in self.dtypes.values())

        def cast(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return self.dtypes.get(value, value)
            if isinstance(value, float) and math.isfinite(value):
                return max(-least, min(least, value))
            return cast_tensor(value, self.dtypes) if isinstance(value, torch.Tensor) else value

        graph_module._apply(cast)
        _cast_where_met(graph_module.graph, self.dtypes)
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                self._constant(graph_module, str(node.target))
                node.meta["val"] = attribute(graph_module, str(node.target))
                continue
            node.args, node.kwargs = (map_aggregate(given, cast) for given in (node.args, node.kwargs))
            if "val" in node.meta:
                node.meta["val"] = map_aggregate(node.meta["val"], lambda v: _followed(v, self.dtypes))
        if not set(HALF).isdisjoint(self.dtypes.values()):
            _complex_of_float32(graph_module.graph, self.dtypes)
        graph_module.recompile()
        return PassResult(graph_module=graph_module, modified=True)

    def _applies(self, graph_module: fx.GraphModule) -> bool:
        nodes = graph_module.graph.nodes
        read = [attribute(graph_module, str(n.target)) for n in nodes if n.op == "get_attr"]
        read += [n.meta.get("val") for n in nodes if n.op == "placeholder"]
        tensors = [t for t in (*read, *graph_module.parameters(), *graph_module.buffers()) if hasattr(t, "dtype")]
        named = [a for n in nodes for a in pytree.tree_leaves((n.args, n.kwargs)) if isinstance(a, torch.dtype)]
        return not self.dtypes.keys().isdisjoint((*(t.dtype for t in tensors), *named))

    def _constant(self, graph_module: fx.GraphModule, path: str) -> None:
        """A constant that is neither parameter nor buffer, which the module's own cast leaves out."""
        value = attribute(graph_module, path)
        if isinstance(value, torch.Tensor) and value.dtype in self.dtypes:
            holder, _, name = path.rpartition(".")
            setattr(graph_module.get_submodule(holder), name, cast_tensor(value, self.dtypes))


def _cast_where_met(graph: fx.Graph, dtypes: Dtypes) -> None:
    """`meta["val"]` is of before. Born is what no float flows into, and no argument names the precision of."""
    born: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        dtype = _float_dtype(node)
        floats = [i for i in node.all_input_nodes if _float_dtype(i) is not None]
        named = any(isinstance(a, torch.dtype) for a in pytree.tree_leaves((node.args, node.kwargs)))
        if dtype is None or named:
            continue
        if all(i in born for i in floats) and all("val" in i.meta for i in node.all_input_nodes):
            born.add(node)
            continue
        for one in floats if dtype in dtypes else ():
            if one in born:
                with graph.inserting_before(node):
                    met = graph.call_function(aten.to.dtype, (one, dtype))
                met.meta = {"val": _float_values(one, dtype)}
                node.replace_input_with(one, met)


def _complex_of_float32(graph: fx.Graph, dtypes: Dtypes) -> None:
    """Once all is cast: what makes complex numbers of real ones takes float32, what reads them is cast behind."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and _computes_complex(n)]
    complex_ones = set(nodes)
    for node in nodes:
        for one in node.all_input_nodes:
            if one not in complex_ones and _float_dtype(one) in HALF:
                with graph.inserting_before(node):
                    wide = graph.call_function(aten.to.dtype, (one, torch.float32))
                wide.meta = {"val": _float_values(one, torch.float32)}
                node.replace_input_with(one, wide)
        dtype = _float_dtype(node)
        readers = [user for user in node.users if user not in complex_ones]
        if dtype in dtypes.values() and readers:
            with graph.inserting_after(node):
                narrow = graph.call_function(aten.to.dtype, (node, dtype))
            narrow.meta = {"val": node.meta["val"]}
            for user in readers:
                user.replace_input_with(node, narrow)


def _computes_complex(node: fx.Node) -> bool:
    """Whether it takes or gives complex numbers, or does so within, as the transform of a Hermitian signal."""
    inside = isinstance(node.target, torch._ops.OpOverload) and node.target.name().startswith("aten::fft_")
    return inside or any(map(is_complex, (node, *node.all_input_nodes)))


def _float_values(node: fx.Node, dtype: torch.dtype) -> Any:
    return map_aggregate(node.meta["val"], lambda v: v.to(dtype) if isinstance(v, torch.Tensor) else v)


def _float_dtype(node: fx.Node) -> torch.dtype | None:
    tensors = (v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor))
    return next((v.dtype for v in tensors if v.is_floating_point()), None)


def _followed(value: Any, dtypes: Dtypes) -> Any:
    return value.to(dtypes.get(value.dtype, value.dtype)) if isinstance(value, torch.Tensor) else value


def cast_tensor(value: torch.Tensor, dtypes: Dtypes) -> torch.Tensor:
    """In its new precision; finite numbers stay finite."""
    dtype = dtypes.get(value.dtype, value.dtype)
    if dtype == value.dtype:
        return value
    limits = torch.finfo(dtype)
    if limits.max < torch.finfo(value.dtype).max and not value.is_meta:
        value = torch.where(value.isfinite(), value.clamp(limits.min, limits.max), value)
    return value.to(dtype)


def cast_signature(signature: Signature, dtypes: Dtypes) -> Signature:
    """What the network takes once it is cast."""
    return replace(
        signature,
        inputs=tuple(
            replace(
                spec,
                dtype=dtypes.get(spec.dtype, spec.dtype),
                example=None if spec.example is None else cast_tensor(spec.example, dtypes),
            )
            for spec in signature.inputs
        ),
    )


def dtypes_for(graph_module: fx.GraphModule, signature: Signature, wanted: torch.dtype | None) -> Dtypes:
    """What has to be cast for a file of this precision. None: float32, and nothing where the network's weights and
    inputs have no other.
    """
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (*graph_module.parameters(), *graph_module.buffers()):
        sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    inputs = {s.dtype for s in signature.inputs if s.dtype.is_floating_point}
    found = {d for d, size in sizes.items() if size} | inputs
    if wanted is None and found <= {torch.float32}:
        return {}
    wanted = wanted or torch.float32
    main = max(found or {torch.float32}, key=lambda d: sizes[d])
    sources = {main, torch.bfloat16, *(HALF if wanted == torch.float32 else ()), *({torch.float64} & found)}
    return {source: wanted for source in sources if source != wanted}
