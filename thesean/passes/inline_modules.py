"""Write the operators of a module that mixes time into the graph, where what it does over time can be given a state.

B batch, T time, D width
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from thesean.passes.analyse.earlier_steps import CONVOLUTIONS
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import attribute, leaf_nodes
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.stream import looks_ahead
from thesean.passes.graph.surgery import erase_dead

aten = torch.ops.aten

_BATCH, _TIME = 2, 7

# Of the output's largest change: rounding moves other steps by 1e-7, one that is seen by 1e-3 and more.
_MOVED = 1e-5


@dataclass(frozen=True)
class InlineModules(Pass):
    """y = part(x)  =>  y = the operators of part, for parts that carry no state and read earlier steps, but none later.

    Those of convolutions that read later ones as well where a part looks ahead, or with `ahead`. x_BTD -> y_BTD; the
    new graph shares its parameters with the incoming one, which stays as it was. What torch can't trace stays a module.
    """

    in_place = False

    signature: Signature
    ahead: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        sizes = {s: _BATCH if s.startswith("batch") else _TIME for s in self.signature.symbols}
        sizes = self.signature.within(sizes)
        modules = dict(graph_module.named_modules())
        calls = [
            n
            for n in graph_module.graph.find_nodes(op="call_module")
            if not getattr(modules[str(n.target)], "stateful", False) and len(n.args) == 1
        ]
        device = next((str(p.device) for p in graph_module.parameters()), "cpu")
        values: Mapping[fx.Node, Any] = {}
        if calls:
            values = record(graph_module, self.signature.random_inputs(sizes, device=device))
        ahead = self.ahead or looks_ahead(graph_module)
        traced = {n.name: t for n in calls if (t := _traced(n, modules[str(n.target)], values, ahead)) is not None}
        if not traced:
            reason = "no module without a state reads earlier steps"
            return PassResult(graph_module=graph_module, modified=False, reason=reason)
        graph = fx.Graph()
        graph.output(graph.graph_copy(graph_module.graph, {}))
        held: dict[str, Any] = {}
        for call in graph.find_nodes(op="call_module"):
            if call.name in traced:
                held |= _inline(graph, call, traced[call.name])
        erase_dead(graph)
        read = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}
        new = fx.GraphModule({t: held[t] if t in held else attribute(graph_module, t) for t in read}, graph)
        new.meta.update(graph_module.meta)
        new.train(graph_module.training)
        return PassResult(graph_module=new, modified=True)


@torch.no_grad()
def _traced(call: fx.Node, module: nn.Module, values: Mapping[fx.Node, Any], ahead: bool) -> fx.GraphModule | None:
    """A module's operators, dynamic in batch and time; None where it reads no earlier step, or a later one that it may
    not read.
    """
    given, kwargs = fx.map_arg((call.args, dict(call.kwargs)), values.__getitem__)
    (x,) = given
    if (
        not isinstance(x, torch.Tensor)
        or x.ndim != 3
        or not x.is_floating_point()
        or not _reads_others(module, x, kwargs, ahead)
    ):
        return None
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    name = next(iter(inspect.signature(module.forward).parameters))
    shapes = {name: free, **{k: free for k, v in kwargs.items() if isinstance(v, torch.Tensor)}}
    try:
        program = torch.export.export(module, (x,), kwargs, dynamic_shapes=shapes, strict=False)
    except Exception:  # torch's tracer raises whatever it meets
        return None
    traced = program.module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    if ahead and CONVOLUTIONS.keys().isdisjoint(n.target for n in traced.graph.nodes):
        return traced if _reads_others(module, x, kwargs, ahead=False) else None
    return traced


def _reads_others(module: nn.Module, x_BTD: torch.Tensor, kwargs: dict[str, Any], ahead: bool) -> bool:
    """Whether the middle step moves later ones, and neither it nor the last one an earlier one, but for `ahead`."""
    before = module(x_BTD, **kwargs)
    if not isinstance(before, torch.Tensor) or before.shape[:2] != x_BTD.shape[:2]:
        return False
    middle, last = x_BTD.shape[1] // 2, x_BTD.shape[1] - 1
    moves = {}
    for step in (middle, last):
        moved_BTD = x_BTD.clone()
        noise_D = torch.randn(x_BTD.shape[2], generator=torch.Generator().manual_seed(0)).to(x_BTD)
        moved_BTD[:, step] += noise_D * x_BTD.std().clamp_min(1e-3)
        change_T = (module(moved_BTD, **kwargs) - before).abs().flatten(2).amax((0, 2))
        moves[step] = change_T > _MOVED * change_T.max()
    return bool(moves[middle][middle + 1 :].any()) and (ahead or not any(bool(moves[t][:t].any()) for t in moves))


def _inline(graph: fx.Graph, call: fx.Node, traced: fx.GraphModule) -> dict[str, Any]:
    """Write the operators in place of the call; what they read, by its path in the graph's module."""
    held: dict[str, Any] = {}
    inputs = [*call.args, *call.kwargs.values()]
    known: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(call):
        for node in traced.graph.nodes:
            if node.op in ("placeholder", "output") or node.target is aten._assert_tensor_metadata.default:
                continue
            copied = known[node] = graph.node_copy(node, known.__getitem__)
            copied.meta = {"nn_module_stack": call.meta.get("nn_module_stack", {})}
            if node.op == "get_attr":
                copied.target = f"{call.target}.{node.target}"
                held[str(copied.target)] = attribute(traced, str(node.target))
    (result,) = leaf_nodes(traced.graph.output_node().args[0])
    call.replace_all_uses_with(known[result])
    graph.erase_node(call)
    return held
