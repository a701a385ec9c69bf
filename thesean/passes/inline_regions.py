"""Regions that torch.export keeps as submodules become part of the graph, where their context changes no number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import attribute
from thesean.passes.graph.surgery import erase_dead

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast  # device, dtype, enabled, cache_enabled, region, *inputs
_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled  # enabled, region, *inputs
_REGION = {_AUTOCAST: 4, _GRADIENTS: 1}


@dataclass(frozen=True)
class InlineRegions(Pass):
    """with torch.autocast(enabled=False): y = f(x)  =>  y = f(x); so for torch.enable_grad.

    with torch.no_grad(): y = f(x)  =>  y = f(x).detach(): what the guide doesn't train, its graph doesn't.
    A region that computes in half precision is refused: as a graph it would run in the guide's own.
    """

    in_place = True

    def requires(self, graph_module: fx.GraphModule) -> None:
        for module in graph_module.modules():
            for node in _regions(module) if isinstance(module, fx.GraphModule) else ():
                if node.target is _AUTOCAST and node.args[2] is not False:
                    raise PassRefused(
                        f"a part of the guide runs under torch.autocast({node.args[0]!r}, {node.args[1]}), which a "
                        "graph doesn't keep. Convert it as it runs without: in the precision of its weights."
                    )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        regions = _regions(graph_module)
        if not regions:
            return PassResult.unchanged(graph_module, "the graph has no region of its own")
        while regions:  # a region may hold regions
            for node in regions:
                _inline(graph_module, node)
            regions = _regions(graph_module)
        erase_dead(graph_module.graph)
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module=graph_module, modified=True)


def _regions(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in _REGION]


def _inline(graph_module: fx.GraphModule, node: fx.Node) -> None:
    place = _REGION[node.target]  # type: ignore[index]
    region, *inputs = node.args[place:]
    assert isinstance(region, fx.Node)
    path = str(region.target)
    inner = attribute(graph_module, path)
    known: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
    graph = graph_module.graph
    with graph.inserting_before(node):
        for one in inner.graph.nodes:
            if one.op in ("placeholder", "output"):
                continue
            copied = graph.node_copy(one, known.__getitem__)
            if one.op in ("get_attr", "call_module"):
                copied.target = f"{path}.{one.target}"
            known[one] = copied
    results = inner.graph.output_node().args[0]
    stops = node.target is _GRADIENTS and node.args[0] is False
    for user in list(node.users):  # each takes one of the region's outputs
        result = known[results[user.args[1]]]
        value = user.meta.get("val")
        if stops and isinstance(value, torch.Tensor) and value.is_floating_point():
            with graph.inserting_before(user):
                source, result = result, graph.call_function(torch.ops.aten.detach.default, (result,))
                result.meta = dict(source.meta)
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)
