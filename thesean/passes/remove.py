"""Take a part out: the stream passes by where it was. The ceiling of every replacement, and the `identity` target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from thesean.errors import PassBroken, PassRefused
from thesean.passes.analyse.bypass import Ends, removal
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.analyse.regions import Region, check_region
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.surgery import clean

aten = torch.ops.aten


@dataclass(frozen=True)
class Remove(Pass):
    """sum = stream + region(entry)  =>  stream. Where it is added to nothing: exit  =>  entry, or zeros of its shape.

    With a module, `stream` and `entry` become module(stream) and module(entry); zeros do not.
    """

    in_place = True

    path: str
    region: Region
    module_name: str = ""
    module: nn.Module | None = None

    @property
    def part(self) -> str:
        return self.path

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        bypass(graph_module, self.region, self.module_name, self.module, path=self.path)
        clean(graph_module)
        return PassResult(graph_module=graph_module, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        check_gone(graph_module, [self.region])


def bypass(
    graph_module: fx.GraphModule,
    region: Region,
    name: str = "",
    module: nn.Module | None = None,
    *,
    path: str,
    flow: DataFlow | None = None,
    entry: fx.Node | None = None,
    ends: Ends | None = None,
) -> fx.Node:
    """Let the stream pass by a region, through `module` where one is given, and return the node that stands where the
    region was. What nothing reads any more stays: many cuts are cleaned up after once.

    Of many cuts into one graph, `flow` is its data flow before the first one, computed once, `entry` what has taken the
    place of the region's own, and `ends` are what goes and what stands for it, as earlier cuts decide it. Raises
    PassRefused, with the graph as it was, for a region of another graph, one that has more than one entry or exit, and
    a module in the place of a part that changes the shape.
    """
    check_region(graph_module, region, flow or data_flow(graph_module.graph), path)
    region = region if entry is None else replace(region, entry=entry)
    graph = graph_module.graph
    found = ends or removal(region)
    if found is None and module is not None:
        raise PassRefused(f"{path}: expected a part that keeps the shape, found one that changes it.")
    removed, kept = found if found is not None else (region.exit, _zeros(graph, region))
    out = kept
    if module is not None:
        graph_module.add_submodule(name, module)
        with graph.inserting_before(removed):
            out = graph.call_module(name, (kept,))
        out.meta = {k: v for k, v in removed.meta.items() if k in ("val", "nn_module_stack")}
    removed.replace_all_uses_with(out)
    graph.erase_node(removed)
    return out


def check_gone(graph_module: fx.GraphModule, regions: Iterable[Region]) -> None:
    """What cuts promise once they are cleaned up after. Raises PassBroken."""
    left = set(graph_module.graph.nodes)
    for region in regions:
        if region.exit in left:
            raise PassBroken(f"remove: expected {region.exit.name} to be gone, found it read by something.")


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
