"""Write the operators of a module that mixes time into the graph, where what it does over time can be given a state.

B batch, T time, D width
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from thesean.passes.analyse.earlier_steps import CONVOLUTIONS
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.clock import has_one_time
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import attribute, leaf_nodes
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.stream import looks_ahead
from thesean.passes.graph.surgery import beside, erase_dead
from thesean.passes.graph.two_sizes import TwoSizes

aten = torch.ops.aten

# Of the output's largest change: rounding moves other steps by 1e-7, one that is seen by 1e-3 and more.
_MOVED = 1e-5


@dataclass(frozen=True)
class InlineModules(Pass):
    """y = part(x)  =>  y = the operators of part, for parts that carry no state and read earlier steps, but none later.

    Those of convolutions that read later ones as well where a part looks ahead, or with `ahead`. The new graph shares
    its parameters with the incoming one, which stays as it was. What torch can't trace stays a module.
    """

    in_place = False

    signature: Signature
    ahead: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        calls = [
            n
            for n in graph_module.graph.find_nodes(op="call_module")
            if not getattr(modules[str(n.target)], "stateful", False) and len(n.args) == 1
        ]
        traced: dict[str, fx.GraphModule] = {}
        if calls and has_one_time(self.signature):
            with evaluating(graph_module):
                two = TwoSizes(graph_module, self.signature)
                tracer = _Tracer(two, self.ahead or looks_ahead(graph_module))
                found = {n.name: tracer.trace(n, modules[str(n.target)]) for n in calls}
            traced = {name: operators for name, operators in found.items() if operators is not None}
        if not traced:
            reason = "no module without a state reads earlier steps"
            return PassResult.unchanged(graph_module, reason)
        graph = beside(graph_module).graph
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


class _Tracer:
    def __init__(self, two: TwoSizes, ahead: bool) -> None:
        self.two, self.ahead = two, ahead

    @torch.no_grad()
    def trace(self, call: fx.Node, module: nn.Module) -> fx.GraphModule | None:
        """A module's operators, dynamic in batch and time; None where it reads no earlier step, or a later one that it
        may not read.
        """
        values, source = self.two.runs[0], call.args[0]
        given: Any = fx.map_arg((call.args, dict(call.kwargs)), values.__getitem__)
        (x,), kwargs = given
        read, made = self.two.time_dim(source), self.two.time_dim(call)
        if read is None or made is None or not x.is_floating_point():
            return None
        later = _reads_others(module, x, kwargs, read, made)
        if later is None or (later and not self.ahead):
            return None
        batch = {} if self.two.sizes[0][0] == self.two.sizes[1][0] else {0: Dim.DYNAMIC}
        name = next(iter(inspect.signature(module.forward).parameters))
        masks = {k: {**batch, 1: Dim.DYNAMIC} for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
        try:
            program = torch.export.export(
                module, (x,), kwargs, dynamic_shapes={name: {**batch, read: Dim.DYNAMIC}, **masks}, strict=False
            )
        except Exception:  # torch's tracer raises whatever it meets
            return None
        traced = program.module(check_guards=False)
        assert isinstance(traced, fx.GraphModule)
        convolves = not CONVOLUTIONS.keys().isdisjoint(n.target for n in traced.graph.nodes)
        return traced if convolves or not later else None


def _reads_others(module: nn.Module, x: torch.Tensor, kwargs: dict[str, Any], read: int, made: int) -> bool | None:
    """Whether a step moves earlier ones; None where the middle one doesn't move later ones. `read` and `made` are the
    dimensions of time in what a module reads and in what it gives.
    """
    before = module(x, **kwargs)
    time = x.shape[read]
    moves = {}
    for step in (time // 2, time - 1):
        moved = x.clone()
        one = moved.select(read, step)
        noise = torch.randn(one.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
        one += noise * x.std().clamp_min(1e-3)
        change_T = (module(moved, **kwargs) - before).abs().movedim(made, 0).flatten(1).amax(1)
        moves[step] = change_T > _MOVED * change_T.max()
    if not moves[time // 2][time // 2 + 1 :].any():
        return None
    return any(bool(moves[t][:t].any()) for t in moves)


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
