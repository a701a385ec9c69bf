"""Give each causal attention that is left its keys and values as state.

B batch, T time, S keys, H heads, K head width
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.causal_attention import CausalAttention, causal_attentions
from thesean.passes.analyse.chunks import RELATES
from thesean.passes.analyse.padding import READERS
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.cache import CachedAttention, SeenKeys
from thesean.passes.graph.clock import NO_TIME, find_clock, has_one_time
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import beside, erase_dead, free_names

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheAttention(Pass):
    """softmax(scale q k' + causal mask) v  =>  mixed, (k, v) = attention(q, k, v, bias); bias, tokens = seen(token).

    Both are modules that carry a state, for ThreadState to thread: keys and values as they meet, rotated already and
    before grouped heads were repeated, (B, G, P, K), P from 0 on; and which of the P steps held a token, (B, P), once
    for all that see alike. With a sliding window of W they are the last W - 1. `token` is what the guide's mask of
    padded steps shows, or True throughout; what the graph's own mask was made of goes. A bias of the distance alone, as
    ALiBi's, is added by how far keys are from the queries; a key of a constant score and no value, a sink, takes its
    share of the weights. The new graph shares its parameters with the incoming one, which stays as it was. Raises
    PassRefused for a causal attention that it can't give a cache, by its path.
    """

    in_place = False

    signature: Signature

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not has_one_time(self.signature):
            return PassResult.unchanged(graph_module, NO_TIME)
        new = beside(graph_module)
        graph = new.graph
        found = causal_attentions(new, self.signature)
        if not found:
            reason = "no causal attention is left in the graph"
            return PassResult.unchanged(graph_module, reason)
        names = free_names(new, "cache")
        keys: dict[Any, fx.Node] = {}
        for core in found:
            if core.sight not in keys:
                keys[core.sight] = self._seen(new, core, next(names))
            _replace(new, core, keys[core.sight], next(names))
        erase_dead(graph)
        new.recompile()
        new.train(graph_module.training)
        return PassResult(graph_module=new, modified=True)

    def _seen(self, graph_module: fx.GraphModule, core: CausalAttention, name: str) -> fx.Node:
        """The bias of those that see as `core` does, made in front of the first of them."""
        graph = graph_module.graph
        graph_module.add_submodule(name, SeenKeys(core.window, core.dtype, core.distance, core.counted))
        with graph.inserting_before(core.mixed):
            token = graph.call_module(name, (self._token(graph, core),))
            bias = graph.call_function(getitem, (token, 0))
        bias.meta[RELATES] = True
        return bias

    def _token(self, graph: fx.Graph, core: CausalAttention) -> fx.Node:
        """(B, T) booleans."""
        if core.padding is not None:
            node = next(n for n in graph.nodes if n.name == core.padding.node)
            reader = READERS[core.padding.rule]
            return node if reader is None else graph.call_function(reader[0], (node, *reader[1]))
        return find_clock(graph, self.signature).tokens(graph, core.device)


def _replace(graph_module: fx.GraphModule, core: CausalAttention, bias: fx.Node, name: str) -> None:
    graph, mixed = graph_module.graph, core.mixed
    graph_module.add_submodule(name, CachedAttention(core.scale, core.cap, core.window, core.sink))
    with graph.inserting_before(mixed):
        query, key, value = core.query, core.key, core.value
        if core.turned:
            key = graph.call_function(aten.transpose.int, (key, -2, -1))
        if core.packed:
            steps = graph.call_function(aten.sym_size.int, (query, 1))
            query, key, value = (
                graph.call_function(aten.reshape.default, (x, [-1, core.packed, steps, width]))
                for x, width in zip((query, key, value), core.widths, strict=True)
            )
        call = graph.call_module(name, (query, key, value, bias))
        out = graph.call_function(getitem, (call, 0))
        if core.packed:
            out = graph.call_function(aten.reshape.default, (out, [-1, steps, core.widths[2]]))
    call.meta["nn_module_stack"] = mixed.meta.get("nn_module_stack", {})
    out.meta = {k: v for k, v in mixed.meta.items() if k in ("val", "nn_module_stack")}
    mixed.replace_all_uses_with(out)
