"""Take a part out: the stream passes by where it was. The ceiling of every replacement, and the `identity` target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph import attribute, constants_of
from thesean.passes.regions import Region, is_linear_map, same_shape, sum_of
from thesean.passes.substitute import clean, clone

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
    ends: tuple[fx.Node, fx.Node] | None = None  # where earlier removals decide: what goes, what takes its place

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self.region.exit.graph is not graph_module.graph:
            raise PassRefused(f"{self.path}: the region belongs to another graph. Plan again for this one.")
        if self.module is not None and self.ends is None and removal(self.region) is None:
            raise PassRefused(f"{self.path}: expected a part that keeps the shape, found one that changes it.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.cut(graph_module)
        clean(graph_module)
        return PassResult(graph_module=graph_module, modified=True)

    def cut(self, graph_module: fx.GraphModule) -> fx.Node:
        """Rewire alone, and the node that stands where the part was: for many cuts that are cleaned up after once."""
        graph = graph_module.graph
        found = self.ends or removal(self.region)
        removed, kept = found if found is not None else (self.region.exit, _zeros(graph, self.region))
        out = kept
        if self.module is not None:
            graph_module.add_submodule(self.name, self.module)
            with graph.inserting_before(removed):
                out = graph.call_module(self.name, (kept,))
            out.meta = {k: v for k, v in removed.meta.items() if k in ("val", "nn_module_stack")}
        removed.replace_all_uses_with(out)
        graph.erase_node(removed)
        return out


Ends = tuple[fx.Node, fx.Node]


def removal(region: Region, gone: Mapping[fx.Node, fx.Node] | None = None) -> Ends | None:
    """(what goes, what takes its place): the sum that the region is added in and the other side of it, where the
    stream that the region reads enters a sum with it; else exit and entry; None where the shapes differ.

    Between the stream and the region may be a norm, but no linear map. `gone` are earlier removals: a sum whose other
    branch went is the branch itself.
    """
    innermost: Ends | None = None
    end = region.exit
    while (joined := sum_of(end)) is not None:
        total, other = joined
        if gone is not None and gone.get(total) is end:
            end = total
            continue
        innermost = innermost or joined
        if _reads_lightly(region.entry, other):
            return innermost if same_shape(*innermost) else None
        end = total
    return (region.exit, region.entry) if same_shape(region.exit, region.entry) else None


def removals(regions: Iterable[Region]) -> list[Ends | None]:
    """The removal of each region, in order: where two parallel branches go, the second one takes with it the sum that
    the first one left.
    """
    found: list[Ends | None] = []
    gone: dict[fx.Node, fx.Node] = {}
    for region in regions:
        ends = removal(region, gone)
        if ends is not None:
            gone[ends[0]] = ends[1]
        found.append(ends)
    return found


def _reads_lightly(entry: fx.Node, stream: fx.Node) -> bool:
    """Whether `entry` is `stream`, or made of it alone and without a linear map."""
    front, seen, found = [entry], {entry}, False
    while front:
        node = front.pop()
        if node is stream:
            found = True
            continue
        if node.op != "call_function" or is_linear_map(node):
            return False
        for above in node.all_input_nodes:
            value = above.meta.get("val")
            if above not in seen and isinstance(value, (torch.Tensor, tuple, list)) and not constants_of(above):
                seen.add(above)
                front.append(above)
    return found


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
    guide = draft.captured.graph_module
    graph_module = clone(guide)
    by_name = {n.name: n for n in graph_module.graph.nodes}
    sites = [s for part in draft.parts if part.target is not None for s in part.sites]
    for site, found in zip(sites, removals(s.region for s in sites), strict=True):
        ends = (by_name[found[0].name], by_name[found[1].name]) if found is not None else None
        out = Remove(site.facts.path, site.region.translate(by_name), ends=ends).cut(graph_module)
        by_name[found[0].name if found is not None else site.region.exit.name] = out  # later regions begin there
    clean(graph_module)
    graph_module.recompile()
    graph_module.graph.lint()
    graph_module.meta["symbols"] = guide.meta["symbols"]
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
    return zeros
