"""Take a part out: the stream passes by where it was. The ceiling of every replacement, and the `identity` target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph import attribute, erase_dead
from thesean.passes.regions import Region, join_of, same_shape
from thesean.passes.substitute import clone, drop_unread

if TYPE_CHECKING:
    from thesean.passes.drafter import Draft

aten = torch.ops.aten


@dataclass(frozen=True)
class Remove(Pass):
    """sum = stream + region(entry)  =>  stream. Where it is added to nothing: exit  =>  entry, or zeros of its shape.

    With a module, `stream` and `entry` become module(stream) and module(entry); zeros do not.
    """

    path: str
    region: Region
    name: str = ""
    module: nn.Module | None = None

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self.region.exit.graph is not graph_module.graph:
            raise PassRefused(f"{self.path}: the region belongs to another graph. Plan again for this one.")
        if self.module is not None and removal(self.region) is None:
            raise PassRefused(f"{self.path}: expected a part that keeps the shape, found one that changes it.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        found = removal(self.region)
        removed, kept = found if found is not None else (self.region.exit, _zeros(graph, self.region))
        out = kept
        if self.module is not None:
            graph_module.add_submodule(self.name, self.module)
            with graph.inserting_before(removed):
                out = graph.call_module(self.name, (kept,))
            out.meta = {k: v for k, v in removed.meta.items() if k in ("val", "nn_module_stack")}
        removed.replace_all_uses_with(out)
        graph.erase_node(removed)
        erase_dead(graph)
        drop_unread(graph_module)
        return PassResult(graph_module=graph_module, modified=True)


def removal(region: Region) -> tuple[fx.Node, fx.Node] | None:
    """(what goes, what takes its place): the sum and its stream, or exit and entry; None where the shapes differ."""
    joined = join_of(region)
    if joined is not None and same_shape(*joined):
        return joined
    return (region.exit, region.entry) if same_shape(region.exit, region.entry) else None


def freed_params(graph_module: fx.GraphModule, region: Region) -> int:
    """Parameters outside of the region that nothing reads once it is taken out: the norm before a branch."""
    found = removal(region)
    dead = {*region.nodes, *(found[:1] if found else ())}
    front = [i for n in dead for i in n.all_input_nodes]
    while front:
        node = front.pop()
        kept = node in dead or node.op == "placeholder" or (found is not None and node is found[1])
        if not kept and all(u in dead for u in node.users):
            dead.add(node)
            front.extend(node.all_input_nodes)
    outside = {n for n in dead if n.op == "get_attr" and not any(u in region.nodes for u in n.users)}
    tensors = {id(t): t for n in outside if isinstance(t := attribute(graph_module, str(n.target)), nn.Parameter)}
    return sum(t.numel() for t in tensors.values())


def without_parts(draft: Draft) -> fx.GraphModule:
    """A copy of the guide without what the plan replaces: no replacement can be faster. It computes nothing useful."""
    graph_module = clone(draft.captured.graph_module)
    by_name = {n.name: n for n in graph_module.graph.nodes}
    for part in draft.parts:
        for site in part.sites if part.target is not None else ():
            region = site.region.translate(by_name)
            found = removal(region)
            Remove(site.facts.path, region)(graph_module)
            if found is not None:
                gone, kept = found
                for name in [n for n, node in by_name.items() if node is gone]:
                    by_name[name] = kept  # later regions begin where this one ended
            else:
                by_name[site.region.exit.name] = next(
                    n for n in graph_module.graph.nodes if n.meta.get("removed") == region.exit.name
                )
    graph_module.meta["symbols"] = draft.captured.graph_module.meta["symbols"]
    return graph_module


def _zeros(graph: fx.Graph, region: Region) -> fx.Node:
    """One zero, seen in the exit's shape."""
    entry, shape = region.entry.meta["val"], region.exit.meta["val"].shape
    with graph.inserting_before(region.exit):
        sizes = [
            graph.call_function(aten.sym_size.int, (region.entry, [str(d) for d in entry.shape].index(str(size))))
            if isinstance(size, torch.SymInt)
            else int(size)
            for size in shape
        ]
        zero = graph.call_function(aten.new_zeros.default, (region.entry, [1] * len(shape)))
        zeros = graph.call_function(aten.expand.default, (zero, sizes))
    zeros.meta = {k: v for k, v in region.exit.meta.items() if k in ("val", "nn_module_stack")}
    zeros.meta["removed"] = region.exit.name
    return zeros
