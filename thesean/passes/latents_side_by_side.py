"""What an attention reads becomes one value where it reads a latent beside something else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.latents import Front, find_fronts
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.surgery import beside, in_order

aten = torch.ops.aten


@dataclass(frozen=True)
class LatentsSideBySide(Pass):
    """attend(q(x), k(c), v(c))  =>  z = cat([x, c], -1); attend(q(z[..., :n]), k(z[..., n:]), v(z[..., n:]))

    c is made of x by more than a linear map, such as a norm between two of them; of z queries, keys and values are
    linear maps, and so the attention is a part that can be cut out and copied. Rotations may lie in between.
    SlicesOfJoins takes it back where the attention stays. The new graph shares its parameters with the incoming one,
    which stays as it was.
    """

    in_place = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not find_fronts(data_flow(graph_module.graph)):
            return PassResult.unchanged(graph_module, "no attention reads a latent beside something else")
        new = beside(graph_module)
        taken: set[fx.Node] = set()
        for front in find_fronts(data_flow(new.graph)):
            if taken.isdisjoint(front.between):  # layers may share keys and values
                _join(new.graph, front)
                taken |= front.between
        in_order(new.graph)
        new.recompile()
        return PassResult(graph_module=new, modified=True)


def _join(graph: fx.Graph, front: Front) -> None:
    widths = [int(source.meta["val"].shape[-1]) for source in front.sources]
    stack = {"nn_module_stack": front.operator.meta.get("nn_module_stack", {})}
    with graph.inserting_after(front.sources[-1]):
        joined = graph.call_function(aten.cat.default, (list(front.sources), -1))
    first = front.sources[0].meta["val"]
    joined.meta = {**stack, "val": first.new_empty((*first.shape[:-1], sum(widths)))}
    start, before = 0, joined
    for source, width in zip(front.sources, widths, strict=True):
        with graph.inserting_after(before):
            before = graph.call_function(aten.slice.Tensor, (joined, -1, start, start + width))
        before.meta = {**stack, "val": source.meta["val"]}
        for user in [user for user in source.users if user in front.between]:
            user.replace_input_with(source, before)
        start += width
