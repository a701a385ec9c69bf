"""export writes equal graphs as ONNX once a process: tests make the same small hybrids and guides anew and write them.

Equal is what `tests.kept_captures.described` gives the same bytes for: code, weights, modules, the modules that nodes
come from, example, names and opset. What each test gets is a model of its own, compared in onnxruntime as any is. All
else is written anew, and so is everything that calls `to_onnx` by itself, as the tests of it do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tests.kept_captures import described
from thesean.deploy.lowering import to_onnx as exporter

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGEST = 1_000_000  # parameters: what is kept holds a copy of them


class KeptFiles:
    """`to_onnx` with a memory."""

    def __init__(self, to_onnx: Callable[..., ir.Model]) -> None:
        self.to_onnx = to_onnx
        self.kept: dict[bytes, bytes] = {}

    def __call__(self, graph_module: fx.GraphModule, example: dict[str, torch.Tensor], *settings: Any) -> ir.Model:
        small = sum(p.numel() for p in graph_module.parameters()) < _LARGEST
        key = described(graph_module, _origins(graph_module), example, settings) if small else None
        if key in self.kept:
            return _read(self.kept[key])
        model = self.to_onnx(graph_module, example, *settings)
        if key is not None:
            self.kept[key] = _written(model)
        return model


def _origins(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    """The modules that each node comes from, by which the file's nodes are named: no part of a graph's code."""
    stacks = ((n.name, n.meta.get("nn_module_stack") or {}) for n in graph_module.graph.nodes)
    return [(name, str([str(place) for place in stack.values()])) for name, stack in stacks]


def _written(model: ir.Model) -> bytes:
    import onnx_ir as ir

    return ir.to_proto(model).SerializeToString()


def _read(written: bytes) -> ir.Model:
    import onnx
    import onnx_ir as ir

    return ir.from_proto(onnx.ModelProto.FromString(written))


to_onnx = KeptFiles(exporter.to_onnx)  # one memory for all tests of a process
