"""Give each attention whose keys and values are made of a latent that latent as state.

B batch, T time
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.chunks import RELATES
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.cache import SeenKeys
from thesean.passes.graph.clock import NO_TIME, find_clock, has_one_time
from thesean.passes.graph.latent_cache import CachedLatent
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import beside, erase_dead, free_names
from thesean.targets.shared.softmax_heads import SoftmaxHeads

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheLatents(Pass):
    """y = part(x)  =>  y, latent = cached(x, bias); bias, tokens = seen(token), for causal parts that have a `latent`.

    Both are modules that carry a state, for ThreadState to thread: what the part makes of each step for all its keys
    and values, (B, P, R), P from 0 on; and which of the P steps held a token, (B, P), once for all that see alike. Keys
    are turned by their row. The new graph shares its parameters with the incoming one, which stays as it was.
    """

    in_place = False

    signature: Signature

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not has_one_time(self.signature):
            return PassResult.unchanged(graph_module, NO_TIME)
        modules = dict(graph_module.named_modules())
        new = beside(graph_module)
        graph = new.graph
        found = [n for n in graph.find_nodes(op="call_module") if _has_latent(modules[str(n.target)])]
        if not found:
            reason = "no causal part has keys and values of one latent"
            return PassResult.unchanged(graph_module, reason)
        names = free_names(graph_module, "latent")
        biases: dict[Any, fx.Node] = {}
        for call in found:
            module = modules[str(call.target)]
            assert isinstance(module, SoftmaxHeads)
            mask = call.kwargs.get("mask")
            alike = (mask, None if module.added is None else call)
            if alike not in biases:
                biases[alike] = self._bias(new, module, call, next(names))
            _replace(new, module, call, biases[alike], next(names))
        erase_dead(graph)
        new.recompile()
        return PassResult(graph_module=new, modified=True)

    def _bias(self, graph_module: fx.GraphModule, module: SoftmaxHeads, call: fx.Node, name: str) -> fx.Node:
        graph, like = graph_module.graph, module.query.weight
        distance = None if module.bias is None else module.bias.behind
        graph_module.add_submodule(name, SeenKeys(None, like.dtype, distance))
        with graph.inserting_before(call):
            token = call.kwargs.get("mask")
            if token is None:
                token = find_clock(graph, self.signature).tokens(graph, like.device)
            bias = graph.call_function(getitem, (graph.call_module(name, (token,)), 0))
        bias.meta[RELATES] = True
        return bias


def _has_latent(module: Any) -> bool:
    return isinstance(module, SoftmaxHeads) and module.causal and module.remembers_what_it_reads


def _replace(graph_module: fx.GraphModule, module: SoftmaxHeads, call: fx.Node, bias: fx.Node, name: str) -> None:
    graph = graph_module.graph
    graph_module.add_submodule(name, CachedLatent(module))
    with graph.inserting_before(call):
        cached = graph.call_module(name, (call.args[0], bias))
        out = graph.call_function(getitem, (cached, 0))
        mask = call.kwargs.get("mask")
        if isinstance(mask, fx.Node):  # a step that holds no token gets nothing
            hidden = graph.call_function(
                aten.logical_not.default, (graph.call_function(aten.unsqueeze.default, (mask, -1)),)
            )
            out = graph.call_function(aten.masked_fill.Scalar, (out, hidden, 0.0))
    cached.meta["nn_module_stack"] = call.meta.get("nn_module_stack", {})
    out.meta = {k: v for k, v in call.meta.items() if k in ("val", "nn_module_stack")}
    call.replace_all_uses_with(out)
