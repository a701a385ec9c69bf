"""Cut a region out of a graph and put a module in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from thesean.errors import PassBroken, PassRefused
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.padding import READERS, Padding
from thesean.passes.analyse.regions import Region, check_region
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.surgery import clean

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Substitute(Pass):
    """exit = region(entry)  =>  exit' = module(entry), or module(entry)[0] when the module carries a state.

    Everything outside of the region keeps its nodes and its parameters, bit for bit. The module is called
    `module_name`. One that reads a mask is given `mask=`: the steps that all of `masks` show.
    """

    in_place = True

    path: str
    region: Region
    module_name: str
    module: nn.Module
    masks: tuple[Padding, ...] = ()

    @property
    def part(self) -> str:
        return self.path

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        splice(graph_module, self.region, self.module_name, self.module, path=self.path, masks=self.masks)
        clean(graph_module)
        return PassResult(graph_module=graph_module, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        check_called_once(graph_module, [self.module_name])


def splice(
    graph_module: fx.GraphModule,
    region: Region,
    name: str,
    module: nn.Module,
    *,
    path: str,
    flow: DataFlow | None = None,
    entry: fx.Node | None = None,
    masks: Sequence[Padding] = (),
) -> fx.Node:
    """Call `module` beside a region and let everything that read the region's exit read the call's output, which is
    returned. What nothing reads any more stays: many splices are cleaned up after once.

    Of many splices into one graph, `flow` is its data flow before the first one, computed once, and `entry` what has
    taken the place of the region's own. Raises PassRefused, with the graph as it was, for a region of another graph,
    a name that is taken and a region that has more than one entry or exit.
    """
    check_region(graph_module, region, flow or data_flow(graph_module.graph), path)
    if hasattr(graph_module, name):
        raise PassRefused(f"{path}: the graph has an attribute {name!r} already.")
    region = region if entry is None else replace(region, entry=entry)
    graph = graph_module.graph
    graph_module.add_submodule(name, module)
    given: dict[str, Any] = {}
    if masks and getattr(module, "reads_mask", False):
        given["mask"] = _seen(graph, masks)
    with graph.inserting_after(region.exit):
        call = graph.call_module(name, (region.entry,), given)
    out = call
    if getattr(module, "stateful", False):
        with graph.inserting_after(call):
            out = graph.call_function(getitem, (call, 0))
    given_dtype, wanted_dtype = (getattr(n.meta.get("val"), "dtype", None) for n in (region.entry, region.exit))
    if given_dtype != wanted_dtype and given_dtype in _FLOATS and wanted_dtype in _FLOATS:
        # a module computes as what it reads: what reads it in turn gets what it got
        with graph.inserting_after(out):
            out = graph.call_function(torch.ops.aten.to.dtype, (out, wanted_dtype))
    out.meta = {k: v for k, v in region.exit.meta.items() if k in ("val", "nn_module_stack")}
    call.meta["nn_module_stack"] = region.exit.meta.get("nn_module_stack", {})
    region.exit.replace_all_uses_with(out, delete_user_cb=lambda user: user is not call)
    return out


def _seen(graph: fx.Graph, masks: Sequence[Padding]) -> fx.Node:
    """(B, T) booleans, True where all masks show a token; made once for all parts that read the same masks."""
    named = {n.name: n for n in graph.nodes}
    nodes = []
    for mask in masks:
        operator = READERS[mask.rule]
        node = named[mask.node]
        nodes.append(node if operator is None else _call(graph, operator[0], (node, *operator[1]), after=node))
    order = {n: i for i, n in enumerate(graph.nodes)}
    seen, *others = sorted(nodes, key=order.__getitem__)
    for other in others:
        seen = _call(graph, torch.ops.aten.logical_and.default, (seen, other), after=other)
    return seen


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], after: fx.Node) -> fx.Node:
    made = next((u for u in after.users if u.target is target and u.args == args), None)
    if made is None:
        with graph.inserting_after(after):
            made = graph.call_function(target, args)
        made.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return made


def check_called_once(graph_module: fx.GraphModule, names: Iterable[str]) -> None:
    """What splices promise. Raises PassBroken."""
    calls = Counter(str(n.target) for n in graph_module.graph.find_nodes(op="call_module"))
    for name in names:
        if calls[name] != 1:
            raise PassBroken(f"substitute: expected one call of {name}, found {calls[name]}.")
