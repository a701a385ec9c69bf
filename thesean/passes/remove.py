"""Take a part out: the stream passes by where it was. The ceiling of every replacement, and the `identity` target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.analyse.bypass import removal
from thesean.passes.analyse.regions import Region
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.surgery import clean

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
