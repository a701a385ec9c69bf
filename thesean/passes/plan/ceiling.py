"""The guide without what a plan replaces: the ceiling of every replacement."""

from __future__ import annotations

from torch import fx

from thesean.passes.analyse.bypass import removals
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.graph.surgery import clean, clone
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.remove import bypass, check_gone


def without_parts(bound_plan: BoundPlan) -> fx.GraphModule:
    """A copy of the guide without what the plan replaces: no replacement can be faster. It computes nothing useful."""
    guide = bound_plan.captured.graph_module
    graph_module = clone(guide)
    flow = data_flow(graph_module.graph)
    nodes = {n.name: n for n in graph_module.graph.nodes}
    by_name = dict(nodes)
    sites = [s for part in bound_plan.parts if part.target is not None for s in part.sites]
    for site, found in zip(sites, removals(s.region for s in sites), strict=True):
        ends = (by_name[found[0].name], by_name[found[1].name]) if found is not None else None
        region, entry = site.region.translate(nodes), by_name[site.region.entry.name]
        out = bypass(graph_module, region, path=site.facts.path, flow=flow, entry=entry, ends=ends)
        by_name[found[0].name if found is not None else site.region.exit.name] = out  # later regions begin there
    clean(graph_module)
    graph_module.recompile()
    graph_module.graph.lint()
    check_gone(graph_module, [s.region.translate(nodes) for s in sites])
    graph_module.meta["symbols"] = guide.meta["symbols"]
    return graph_module
